"""Text to token ids and back: a thin layer over transformers' fast tokenizers, for many threads at once.

Only local files are read and nothing in them is executed. Knows nothing about requests or streams; text that grows
token by token is the business of `engine.detokenizer`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraplex.server.errors import FieldViolation, InvalidRequestError, ModelLoadError

if TYPE_CHECKING:
    import tokenizers
    from transformers import PreTrainedTokenizerFast

CHAT_ROLES = ("system", "user", "assistant")

# Classes that take tokenizer.json as it is. Naming the class here spares AutoTokenizer, which imports the model's
# configuration and with it torch._dynamo: 4.1 s of start-up become 1.3 s.
_PLAIN_CLASSES = frozenset({"PreTrainedTokenizerFast", "TokenizersBackend"})


class Tokenizer:
    """Encodes prompts and chats, decodes tokens. Every method may be called from any thread.

    `byte_token_ids` are the byte-fallback tokens (`<0x00>` to `<0xFF>`): the text of a run of them is known only when
    the run has ended.
    """

    def __init__(self, backend: PreTrainedTokenizerFast) -> None:
        """Wrap a tokenizer that transformers has made."""
        self._backend = backend
        self.fast: tokenizers.Tokenizer = backend.backend_tokenizer
        # A tokenizer.json may carry the truncation and padding of the training run.
        self.fast.no_truncation()
        self.fast.no_padding()
        self._special_ids = frozenset(i for i, t in self.fast.get_added_tokens_decoder().items() if t.special)
        spellings = (spelling for byte in range(256) for spelling in {f"<0x{byte:02X}>", f"<0x{byte:02x}>"})
        self.byte_token_ids = frozenset(i for s in spellings if (i := self.fast.token_to_id(s)) is not None)

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Read the tokenizer of a Hugging Face folder; one without `tokenizer.json` is converted.

        Raises:
            ModelLoadError: if `path` is no folder, or holds no tokenizer that can be made a fast one without running
                code of its own.
        """
        if not path.is_dir():
            raise ModelLoadError(f"no tokenizer at {path}: not a folder")
        try:
            backend = _load_backend(path)
        except Exception as error:  # transformers and tokenizers raise anything here, bare Exception included
            raise ModelLoadError(f"cannot load the tokenizer in {path}: {error}") from error
        if not getattr(backend, "is_fast", False):
            raise ModelLoadError(
                f"the tokenizer in {path} ({type(backend).__name__}) exists only in Python; "
                "save it with a tokenizer.json"
            )
        return cls(backend)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included. The model's logits may be wider: rows added for alignment."""
        return self.fast.get_vocab_size(with_added_tokens=True)

    @property
    def chat_template(self) -> str | None:
        """The model's own default chat template, if it has one."""
        template = self._backend.chat_template
        return template.get("default") if isinstance(template, dict) else template

    @property
    def special_tokens(self) -> dict[str, str]:
        """The special tokens by name (`bos_token`), as chat templates use them."""
        return dict(self._backend.special_tokens_map)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a prompt, with the tokens that this tokenizer puts around one (such as BOS)."""
        # Not through transformers: it sets truncation and padding anew on the shared tokenizer at every call.
        return self.fast.encode(text, add_special_tokens=True).ids

    def encode_rendered(self, text: str) -> list[int]:
        """Return the token ids of what a chat template wrote, which has BOS and the like in it already."""
        return self.fast.encode(text, add_special_tokens=False).ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of `token_ids`: U+FFFD where bytes are no UTF-8, nothing for ids that no token has."""
        return self.fast.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def is_visible(self, token_id: int) -> bool:
        """Whether `decode` takes note of this token: it is in the vocabulary, and not a special one."""
        return token_id not in self._special_ids and self.fast.id_to_token(token_id) is not None

    def apply_chat_template(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        """Return the token ids that the model's own template, which the operator chose, makes of a chat.

        They end where the assistant's next turn begins. `messages` are (role, content) pairs.

        Raises:
            InvalidRequestError: for no messages, an unknown role, no template, or one that fails or refuses these
                messages.
        """
        turns = chat_turns(messages)
        if self.chat_template is None:
            raise InvalidRequestError.of(
                "chat", "the model has no chat template; send text, or select an adapter that brings a template"
            )
        try:
            text = str(
                self._backend.apply_chat_template(
                    turns, chat_template=self.chat_template, add_generation_prompt=True, tokenize=False
                )
            )
        except Exception as error:  # a template can raise anything
            raise InvalidRequestError.of("chat", f"the chat template does not take this chat: {error}") from error
        return self.encode_rendered(text)


def chat_turns(messages: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    """Return (role, content) pairs as chat templates take them.

    Raises:
        InvalidRequestError: for no messages or an unknown role.
    """
    _check_messages(messages)
    return [{"role": role, "content": content} for role, content in messages]


def _load_backend(path: Path) -> Any:
    """Return the tokenizer object that transformers makes of the folder."""
    # Imported when needed: it takes a second, and modules that only name the type should not.
    if _is_plain(path):
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)


def _is_plain(path: Path) -> bool:
    """Whether tokenizer.json is all there is to know."""
    config_file = path / "tokenizer_config.json"
    if not config_file.is_file() or not (path / "tokenizer.json").is_file():
        return False
    config = json.loads(config_file.read_text(encoding="utf-8"))
    return config.get("tokenizer_class") in _PLAIN_CLASSES and "auto_map" not in config


def _check_messages(messages: Sequence[tuple[str, str]]) -> None:
    def violations() -> Iterable[FieldViolation]:
        if not messages:
            yield FieldViolation("chat.messages", "a chat has at least one message")
        for index, (role, _) in enumerate(messages):
            if role not in CHAT_ROLES:
                yield FieldViolation(f"chat.messages[{index}].role", f"{role!r} is none of {', '.join(CHAT_ROLES)}")

    bad = list(violations())
    if bad:
        raise InvalidRequestError(bad)
