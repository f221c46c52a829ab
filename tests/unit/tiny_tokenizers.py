"""Small tokenizers of the two kinds that decoder models use, made on the spot, so that no test needs a model."""

from functools import cache

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as FastTokenizer
from transformers import PreTrainedTokenizerFast

from loraplex.server.tokenizer import Tokenizer

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = (
    "The quick brown fox jumps over the lazy dog. Hello world, hello again; don't stop!",
    "Zażółć gęślą jaźń. Ünïcödé und Straße. 你好世界!今天天气很好。 Привет, мир.",
    "def f(x):\n    return x + 1\n\n# numbers 0 1 2 3 4 5 6 7 8 9",
)


def wrap(fast: FastTokenizer, chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, bos_token="<s>", eos_token="</s>", chat_template=chat_template
    )


def byte_level_fast() -> FastTokenizer:
    """GPT-2 style: tokens are byte strings, so that a character may be split anywhere."""
    fast = FastTokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fast.train_from_iterator(CORPUS, trainer)
    # An added token that is not special shows in the text; this one holds characters outside of the byte alphabet.
    fast.add_tokens([AddedToken("<tool é 你>", special=False, normalized=False)])
    fast.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", fast.token_to_id("<s>"))]
    )
    return fast


def byte_fallback_fast() -> FastTokenizer:
    """Llama 2 style: word pieces with a visible space, and a token per byte for what they lack."""
    trained = FastTokenizer(models.Unigram())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(CORPUS[:1], trainers.UnigramTrainer(vocab_size=60, show_progress=False))
    pieces = {piece: -float(i) / 10 for i, piece in enumerate(trained.get_vocab())} | {"▁": -9.0, "\ufffd": -9.0}
    byte_pieces = [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    vocab = [("<unk>", -30.0), ("<s>", 0.0), ("</s>", 0.0), *byte_pieces, *pieces.items()]
    fast = FastTokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=True))
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast.add_special_tokens(["<s>", "</s>"])
    fast.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", fast.token_to_id("<s>"))]
    )
    return fast


def metaspace_fast() -> FastTokenizer:
    """As `byte_fallback_fast`, decoded by Metaspace (T5, converted sentencepiece models)."""
    fast = byte_fallback_fast()
    fast.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always")])
    return fast


@cache
def byte_level() -> Tokenizer:
    return Tokenizer(wrap(byte_level_fast()))


@cache
def byte_fallback() -> Tokenizer:
    return Tokenizer(wrap(byte_fallback_fast()))


@cache
def metaspace() -> Tokenizer:
    return Tokenizer(wrap(metaspace_fast()))


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """Return the id of a token that must exist."""
    found = tokenizer.fast.token_to_id(token)
    assert found is not None, f"no token {token!r}"
    return found
