"""The pieces of a stream joined are the text of a full decode; nothing of a stop string gets out."""

from collections.abc import Sequence
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex.server.engine.detokenizer import IncrementalDetokenizer
from loraplex.server.tokenizer import Tokenizer
from tests.unit import tiny_tokenizers

TOKENIZERS = {
    "byte-level": tiny_tokenizers.byte_level,
    "byte-fallback": tiny_tokenizers.byte_fallback,
    "metaspace": tiny_tokenizers.metaspace,
}
TEXTS = (
    "Hello world, 你好世界!",
    "family 👨‍👩‍👧‍👦 flag 🇩🇪 thumbs 👍🏽.",
    "e\u0301 combining a\u0308\u0323 and zalgo t\u0336e\u0336x\u0336t",
    "  two  spaces\n\n\ttabs and ▁ and \ufffd itself",
    "ಕನ್ನಡ ไทย עברית العربية",
)
PROMPTS = ("", "Hello", "the fox ", "你好", "🎉", "a b c d e f g h i j k l m n o p q")

each_tokenizer = pytest.mark.parametrize("make", TOKENIZERS.values(), ids=TOKENIZERS.keys())


def stream(tokenizer: Tokenizer, prompt: Sequence[int], output: Sequence[int], stop: Sequence[str] = ()) -> list[str]:
    """All pieces, the flushed one last."""
    detokenizer = IncrementalDetokenizer(tokenizer, prompt, stop)
    pieces: list[str] = []
    for token_id in output:
        pieces.append(detokenizer.push(token_id).text)
        if detokenizer.stopped:
            return pieces
    return [*pieces, detokenizer.finish()]


def text_after(tokenizer: Tokenizer, prompt: Sequence[int], output: Sequence[int]) -> str:
    """The full decode of both without the prompt's text."""
    whole, before = tokenizer.decode([*prompt, *output]), tokenizer.decode(prompt)
    assert whole.startswith(before)
    return whole[len(before) :]


@cache
def not_ascii(tokenizer: Tokenizer) -> list[int]:
    return [i for i in range(tokenizer.vocab_size) if not tokenizer.decode([i]).isascii()]


@each_tokenizer
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_pieces_of_real_text_join_to_the_full_decode(make, text, prompt):
    tokenizer = make()
    prompt_ids = tokenizer.encode(prompt)
    output = tokenizer.fast.encode(text, add_special_tokens=False).ids
    pieces = stream(tokenizer, prompt_ids, output)
    assert "".join(pieces) == text_after(tokenizer, prompt_ids, output)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces), "half a character got out"


@each_tokenizer
@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.data())
def test_pieces_of_random_tokens_join_to_the_full_decode(make, data):
    tokenizer = make()
    # Beyond the vocabulary too: logits are often padded, and a sampled padding row must not do harm.
    any_id = st.integers(0, tokenizer.vocab_size + 20)
    token_ids = st.lists(st.one_of(any_id, st.sampled_from(not_ascii(tokenizer))), max_size=60)
    # Not a prompt with bytes at its end: invalid bytes after them would change the prompt's own text.
    prompt = tokenizer.encode(data.draw(st.sampled_from([text for text in PROMPTS if text.isascii()])))
    output = data.draw(token_ids)
    assert "".join(stream(tokenizer, prompt, output)) == text_after(tokenizer, prompt, output)


@each_tokenizer
def test_words_after_a_prompt_keep_their_space_and_first_words_have_none(make):
    tokenizer = make()
    output = tokenizer.fast.encode("hello world", add_special_tokens=False).ids
    assert "".join(stream(tokenizer, [tiny_tokenizers.token_id(tokenizer, "<s>")], output)) == "hello world"
    after = tokenizer.fast.encode(" hello", add_special_tokens=False).ids
    assert "".join(stream(tokenizer, tokenizer.encode("the fox"), after)).startswith(" ")


def test_a_character_of_several_tokens_appears_with_its_last_token():
    tokenizer = tiny_tokenizers.byte_level()
    output = tokenizer.fast.encode("🙃", add_special_tokens=False).ids
    assert len(output) > 1
    assert stream(tokenizer, [], output) == [*[""] * (len(output) - 1), "🙃", ""]


@each_tokenizer
def test_an_unfinished_character_at_the_end_is_flushed_as_a_full_decode_shows_it(make):
    tokenizer = make()
    output = tokenizer.fast.encode("ok🙃", add_special_tokens=False).ids[:-1]
    *pieces, flushed = stream(tokenizer, [], output)
    assert "".join(pieces) == "ok"
    assert "ok" + flushed == tokenizer.decode(output)
    assert set(flushed) == {"\ufffd"}


def test_a_character_that_the_prompt_began_belongs_to_the_output():
    tokenizer = tiny_tokenizers.byte_level()
    ids = tokenizer.encode("fox🙃")
    for cut in range(1, 4):
        assert "".join(stream(tokenizer, ids[:-cut], ids[-cut:])) == "🙃"


def test_a_run_of_byte_tokens_waits_for_its_end_and_turns_invalid_as_a_whole():
    tokenizer = tiny_tokenizers.byte_fallback()
    ids = [tiny_tokenizers.token_id(tokenizer, f"<0x{byte:02X}>") for byte in "你".encode()]
    invalid = tiny_tokenizers.token_id(tokenizer, "<0xFF>")
    word = tiny_tokenizers.token_id(tokenizer, "▁")
    assert stream(tokenizer, [], [*ids, word]) == ["", "", "", "你 ", ""]
    assert "".join(stream(tokenizer, [], [*ids, invalid, word])) == "\ufffd" * 4 + " "


def test_invalid_bytes_do_not_hold_back_the_text():
    tokenizer = tiny_tokenizers.byte_level()
    invalid = tiny_tokenizers.token_id(tokenizer, "ÿ")  # the byte 0xFF
    assert tokenizer.decode([invalid]) == "\ufffd"
    detokenizer = IncrementalDetokenizer(tokenizer, [])
    pieces = [detokenizer.push(invalid).text for _ in range(100)]
    assert "".join(pieces) == "\ufffd" * 99


@each_tokenizer
def test_the_decoded_window_stays_small(make):
    class Counting(Tokenizer):
        longest = 0

        def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
            Counting.longest = max(Counting.longest, len(token_ids))
            return super().decode(token_ids, skip_special_tokens)

    tokenizer = Counting(tiny_tokenizers.wrap(make().fast))
    words = tokenizer.fast.encode("the quick brown fox " * 200, add_special_tokens=False).ids
    stream(tokenizer, words, [*words, *[0, 1, 2, tokenizer.vocab_size + 5] * 100, *words])
    assert Counting.longest <= 16


def cut(text: str, stops: Sequence[str]) -> str:
    """Where the first stop string to be complete begins, by definition."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - len(max(found, key=len))]
    return text


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("hello world again", ["world"], "hello "),
        ("hello world", ["wor", "hello world"], "hello "),
        ("hello world", ["ello", "hello"], ""),
        ("aaab", ["aab"], "a"),
        ("abababc", ["ababc"], "ab"),
        ("no stop her", ["here"], "no stop her"),
        ("你好世界", ["世"], "你好"),
        ("one\n\ntwo", ["\n\n"], "one"),
    ],
)
def test_text_ends_before_the_stop_string_across_tokens(text, stop, expected):
    tokenizer = tiny_tokenizers.byte_level()
    output = tokenizer.fast.encode(text, add_special_tokens=False).ids
    assert "".join(stream(tokenizer, [], output, stop)) == expected == cut(text, stop)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    text=st.text("ab é🙃", max_size=40),
    stop=st.lists(st.text("ab é🙃", min_size=1, max_size=5), min_size=1, max_size=4),
    split=st.booleans(),
)
def test_stop_strings_cut_the_same_however_the_text_is_split(text, stop, split):
    tokenizer = tiny_tokenizers.byte_level()
    encoded = (tokenizer.fast.encode(t, add_special_tokens=False).ids for t in (text if split else [text]))
    pieces = stream(tokenizer, [], [i for ids in encoded for i in ids], stop)
    assert "".join(pieces) == cut(text, stop)


def test_only_what_may_become_a_stop_string_is_held_back():
    tokenizer = tiny_tokenizers.byte_level()
    detokenizer = IncrementalDetokenizer(tokenizer, [], ["xyz"])
    texts = [detokenizer.push(tiny_tokenizers.token_id(tokenizer, char)).text for char in "axxyaxy"]
    assert texts == ["a", "", "x", "", "xya", "", ""]
    assert detokenizer.finish() == "xy"
    assert not detokenizer.stopped


def test_the_last_flush_can_complete_a_stop_string():
    tokenizer = tiny_tokenizers.byte_fallback()
    detokenizer = IncrementalDetokenizer(tokenizer, [], ["你"])
    output = tokenizer.fast.encode("fox 你", add_special_tokens=False).ids
    text = "".join(detokenizer.push(i).text for i in output)
    assert not detokenizer.stopped
    assert text + detokenizer.finish() == "fox "
    assert detokenizer.stopped
