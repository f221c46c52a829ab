"""Text that grows token by token: whole characters only, and nothing of a stop string.

The text of one more token is the difference of two decodes of a short window, as in vLLM and text-generation-inference,
because only the tokenizer's own decoder knows about spaces at word starts, byte tokens and invalid bytes. tokenizers'
DecodeStream works alike but raises on a run of byte tokens that turns out invalid, and holds everything back from the
first invalid byte on; see `_TextStream` for what replaces it.

Knows nothing about end-of-sequence tokens, which are never passed in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loraplex.server.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"

# Tokens that a window keeps as context. A character has at most 4 bytes and a visible token at least 1, so that an
# unfinished character never reaches back further; a space in front of a word needs one token of context.
_CONTEXT_TOKENS = 8


@dataclass(frozen=True)
class DetokenizedText:
    """Text that has become certain; with `stopped`, the last there is: a stop string follows it."""

    text: str
    stopped: bool = False


class IncrementalDetokenizer:
    """The text of one sequence's output.

    The pieces of all calls joined equal the full decode of prompt and output, without the prompt's text, up to the
    first stop string. Amortised cost of a token: one decode of at most 16 tokens, whatever the length.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], stop: Sequence[str] = ()) -> None:
        """Start after the prompt; `stop` strings are not empty (`SamplingParams.validate`)."""
        self._stream = _TextStream(tokenizer, prompt_token_ids)
        self._stops = _StopStrings(stop)
        self.stopped = False

    def push(self, token_id: int) -> DetokenizedText:
        """Add one output token; return the text that is certain now and cannot be a part of a stop string."""
        return self._emit(self._stream.push(token_id))

    def finish(self) -> str:
        """Return what was held back, once no more tokens come; half a character becomes U+FFFD.

        The last characters can complete a stop string: `stopped` is set then and the text ends before it.
        """
        last = self._emit(self._stream.finish())
        return last.text if last.stopped else last.text + self._stops.flush()

    def _emit(self, text: str) -> DetokenizedText:
        assert not self.stopped, "no text follows a stop string"
        safe, self.stopped = self._stops.push(text)
        return DetokenizedText(safe, self.stopped)


class _TextStream:
    """Turns tokens into text over a window of recent tokens, of whose text `_emitted` has been given out.

    Two things are held back. A U+FFFD at the very end may be the first bytes of a character (a decoder of byte-level
    tokens gives one U+FFFD for them): it stays until the next token. A run of byte-fallback tokens stays until it has
    ended, because a single invalid byte makes all characters of its run invalid.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._window = self._prompt_context(prompt_token_ids)
        self._emitted = tokenizer.decode(self._window)

    def push(self, token_id: int) -> str:
        # Decoding leaves such tokens out; here they would only push context out of the window.
        if not self._tokenizer.is_visible(token_id):
            return ""
        self._window.append(token_id)
        if token_id in self._tokenizer.byte_token_ids:
            return ""
        new = self._take(_without_partial_character(self._tokenizer.decode(self._window)))
        if len(self._window) >= 2 * _CONTEXT_TOKENS:
            self._shorten()
        return new

    def finish(self) -> str:
        return self._take(self._tokenizer.decode(self._window))

    def _take(self, text: str) -> str:
        """Return what `text`, the window's text, has beyond the part that is out."""
        if not text.startswith(self._emitted):
            # The output completes a character that the prompt began, or spoils its last run of byte tokens: from
            # there on, the text belongs to the output.
            pairs = enumerate(zip(self._emitted, text, strict=False))
            shared = next((i for i, (a, b) in pairs if a != b), min(len(self._emitted), len(text)))
            self._emitted = text[:shared]
        new = text[len(self._emitted) :]
        self._emitted = text
        return new

    def _shorten(self) -> None:
        start = len(self._window) - _CONTEXT_TOKENS
        while self._window[start] in self._tokenizer.byte_token_ids:
            start += 1  # a run of bytes can only be decoded whole; the last token is none
        self._window = self._window[start:]
        self._emitted = _without_partial_character(self._tokenizer.decode(self._window))

    def _prompt_context(self, prompt_token_ids: Sequence[int]) -> list[int]:
        """Return the last visible tokens of the prompt, back to where a run of byte tokens starts."""
        context: list[int] = []
        for token_id in reversed(prompt_token_ids):
            if not self._tokenizer.is_visible(token_id):
                continue
            if len(context) >= _CONTEXT_TOKENS and context[-1] not in self._tokenizer.byte_token_ids:
                break
            context.append(token_id)
        return context[::-1]


def _without_partial_character(text: str) -> str:
    return text[:-1] if text.endswith(_REPLACEMENT) else text


class _StopStrings:
    """Lets text through up to the first stop string: the one that is complete first; of several, the longest.

    So the cut does not depend on how the text is split into pieces. Holds back what may yet become a stop string.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._matchers = [_StopMatcher(stop) for stop in stops]
        self._first_chars = {stop[0] for stop in stops}
        self._held = ""

    def push(self, piece: str) -> tuple[str, bool]:
        """Return the text that is safe now, and whether a stop string follows it."""
        if not self._held and self._first_chars.isdisjoint(piece):
            return piece, False  # nothing begun, nothing begins: most tokens
        text = self._held + piece
        for end, char in enumerate(piece, len(self._held) + 1):
            complete = max(matcher.push(char) for matcher in self._matchers)
            if complete:
                return text[: end - complete], True
        safe = len(text) - max(matcher.matched for matcher in self._matchers)
        self._held = text[safe:]
        return text[:safe], False

    def flush(self) -> str:
        """Return what is held back."""
        return self._held


class _StopMatcher:
    """How much of one stop string the text ends with, character by character (Knuth, Morris and Pratt, 1977)."""

    def __init__(self, stop: str) -> None:
        self._stop = stop
        self.matched = 0
        # _fallback[n]: the longest proper prefix of the stop string that its first n + 1 characters end with.
        self._fallback = [0]
        for char in stop[1:]:
            self._fallback.append(self._extend(self._fallback[-1], char))

    def push(self, char: str) -> int:
        """Take one character; return the stop string's length if it is complete now, else 0. Not called after that."""
        self.matched = self._extend(self.matched, char)
        return self.matched if self.matched == len(self._stop) else 0

    def _extend(self, matched: int, char: str) -> int:
        while matched and self._stop[matched] != char:
            matched = self._fallback[matched - 1]
        return matched + (self._stop[matched] == char)
