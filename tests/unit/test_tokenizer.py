"""Loading tokenizers from folders of several kinds, prompts, and chats through templates."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from loraplex.server.errors import InvalidRequestError, ModelLoadError
from loraplex.server.tokenizer import Tokenizer
from tests.unit import tiny_tokenizers

CHAT = [("system", "Be brief."), ("user", "Hello, 你好!")]
MESSAGES = [{"role": role, "content": content} for role, content in CHAT]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_tokenizers.wrap(tiny_tokenizers.byte_level_fast()).save_pretrained(tmp_path)
    return tmp_path


def test_encode_adds_what_the_tokenizer_adds_and_decode_leaves_it_out():
    tokenizer = tiny_tokenizers.byte_level()
    ids = tokenizer.encode("Hello, 你好!")
    assert ids[0] == tokenizer.fast.token_to_id("<s>")
    assert ids.count(ids[0]) == 1
    assert tokenizer.decode(ids) == "Hello, 你好!"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<s>Hello, 你好!"
    assert tokenizer.vocab_size == len(tokenizer.fast.get_vocab())


def test_ids_beyond_the_vocabulary_are_invisible():
    tokenizer = tiny_tokenizers.byte_level()
    assert tokenizer.decode([tokenizer.vocab_size + 5]) == ""
    visible = [i for i in range(tokenizer.vocab_size + 10) if tokenizer.is_visible(i)]
    specials = {tokenizer.fast.token_to_id(t) for t in ("<s>", "</s>", "<|im_start|>", "<|im_end|>")}
    assert visible == [i for i in range(tokenizer.vocab_size) if i not in specials]


def test_byte_tokens_are_those_of_byte_fallback():
    assert tiny_tokenizers.byte_level().byte_token_ids == frozenset()
    assert len(tiny_tokenizers.byte_fallback().byte_token_ids) == 256


@pytest.mark.parametrize("plain", [True, False])
def test_a_folder_gives_the_ids_of_transformers(folder, plain):
    config_file = folder / "tokenizer_config.json"
    config = json.loads(config_file.read_text())
    if not plain:  # the way through AutoTokenizer
        (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
        del config["tokenizer_class"]
        config_file.write_text(json.dumps(config))
    tokenizer, expected = Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
    assert tokenizer.encode("Hello world, 你好") == expected.encode("Hello world, 你好")
    assert tokenizer.chat_template == expected.chat_template
    assert tokenizer.apply_chat_template(CHAT) == expected.apply_chat_template(
        MESSAGES, add_generation_prompt=True, return_dict=False
    )


def test_truncation_and_padding_of_the_training_run_are_ignored(folder):
    fast = tiny_tokenizers.byte_level_fast()
    fast.enable_truncation(4)
    fast.enable_padding(length=50)
    fast.save(str(folder / "tokenizer.json"))
    text = "The quick brown fox jumps over the lazy dog."
    assert Tokenizer.load(folder).encode(text) == tiny_tokenizers.byte_level().encode(text)


def test_a_sentencepiece_model_alone_is_converted(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(tiny_tokenizers.CORPUS * 5))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=420,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    tokenizer = Tokenizer.load(tmp_path)
    text = "Hello world, again 🙃 你好"
    expected = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model")).encode(text)
    assert tokenizer.encode(text)[-len(expected) :] == expected
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.byte_token_ids) == 256


def test_what_is_no_tokenizer_is_refused(tmp_path):
    with pytest.raises(ModelLoadError, match="not a folder"):
        Tokenizer.load(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelLoadError, match="cannot load the tokenizer"):
        Tokenizer.load(tmp_path / "empty")


def test_a_broken_tokenizer_file_is_refused(folder):
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelLoadError, match="cannot load the tokenizer"):
        Tokenizer.load(folder)


def test_code_in_the_folder_is_not_run(tmp_path):
    trace = tmp_path / "was_run"
    (tmp_path / "custom.py").write_text(f"open({str(trace)!r}, 'w').close()\nclass Custom: pass\n")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    config = {"tokenizer_class": "Custom", "auto_map": {"AutoTokenizer": ["custom.Custom", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelLoadError):
        Tokenizer.load(tmp_path)
    assert not trace.exists()


def test_a_chat_ends_where_the_assistant_begins_and_has_its_control_tokens():
    tokenizer = tiny_tokenizers.byte_level()
    ids = tokenizer.apply_chat_template(CHAT)
    assert tokenizer.decode(ids, skip_special_tokens=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello, 你好!<|im_end|>\n<|im_start|>assistant\n"
    )
    assert ids.count(tiny_tokenizers.token_id(tokenizer, "<|im_start|>")) == 3


def test_what_a_template_wrote_gets_no_second_bos():
    tokenizer = tiny_tokenizers.byte_level()
    text = f"{tokenizer.special_tokens['bos_token']}Hello, 你好! =>"
    assert tokenizer.encode_rendered(text) == tokenizer.encode("Hello, 你好! =>")


def test_without_any_template_the_error_says_what_to_do():
    tokenizer = Tokenizer(tiny_tokenizers.wrap(tiny_tokenizers.byte_level_fast(), chat_template=None))
    assert tokenizer.chat_template is None
    with pytest.raises(InvalidRequestError, match="no chat template; send text"):
        tokenizer.apply_chat_template(CHAT)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for %}", "does not take this chat"),
        ("{{ messages[7]['content'] }}", "does not take this chat"),
        ("{{ 1 // 0 }}", "does not take this chat"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
    ],
)
def test_a_template_that_fails_is_the_requests_error(template, message):
    with pytest.raises(InvalidRequestError, match=message) as caught:
        Tokenizer(tiny_tokenizers.wrap(tiny_tokenizers.byte_level_fast(), chat_template=template)).apply_chat_template(
            CHAT
        )
    assert [violation.field for violation in caught.value.violations] == ["chat"]


def test_every_unknown_role_is_named():
    messages = [("user", "a"), ("robot", "b"), ("assistant", "c"), ("", "d")]
    with pytest.raises(InvalidRequestError, match="'robot' is none of system, user, assistant") as caught:
        tiny_tokenizers.byte_level().apply_chat_template(messages)
    fields = [violation.field for violation in caught.value.violations]
    assert fields == ["chat.messages[1].role", "chat.messages[3].role"]


def test_a_chat_without_messages_is_refused():
    with pytest.raises(InvalidRequestError, match="at least one message"):
        tiny_tokenizers.byte_level().apply_chat_template([])


def test_threads_share_a_tokenizer():
    tokenizer = tiny_tokenizers.byte_level()
    texts = [f"text number {i} " * (i % 7 + 1) for i in range(200)]

    def work(text: str) -> tuple[list[int], str, list[int]]:
        ids = tokenizer.encode(text)
        return ids, tokenizer.decode(ids), tokenizer.apply_chat_template([("user", text)])

    alone = [work(text) for text in texts]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, texts)) == alone
    assert [decoded for _, decoded, _ in alone] == texts
