"""Reading training data: what is taken, and that whatever is wrong is told with file, line and field."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from loraplex.adapters.errors import InvalidRequestError, NotFoundError
from loraplex.adapters.training import data_rows
from loraplex.adapters.training.data_error import DataError
from loraplex.adapters.training.data_rows import read_rows
from loraplex.adapters.training.sample import Sample
from loraplex.adapters.training.train_config import TrainConfig
from loraplex.adapters.training.training_data import TrainingData, load_data, split
from tests.unit.tiny_tokenizers import byte_level_fast, wrap

PAIRS = [{"prompt": f"Number {n}?", "completion": f"It is {n}."} for n in range(10)]
TALK = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "world"}]


def write(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def load(path: Path, **settings: Any) -> TrainingData:
    values = {"model": "m", "data": str(path), "output_dir": "out", **settings}
    return load_data(TrainConfig.from_values(values), wrap(byte_level_fast()))


def test_three_kinds_of_files_hold_the_same_rows(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.Table.from_pylist(PAIRS), tmp_path / "d.parquet")
    (tmp_path / "d.csv").write_text(
        "prompt,completion\n" + "".join(f"{r['prompt']},{r['completion']}\n" for r in PAIRS)
    )
    (tmp_path / "d.tsv").write_text("prompt\tcompletion\n" + "".join("\t".join(r.values()) + "\n" for r in PAIRS))
    write(tmp_path / "d.jsonl", PAIRS)
    for name in ("d.parquet", "d.csv", "d.tsv", "d.jsonl"):
        assert [row.values for row in read_rows(str(tmp_path / name))] == PAIRS, name


def test_csv_with_quotes_and_line_breaks(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text('\ufeffprompt,completion\n"a, ""b""\nc",d\n\ne,f\n', encoding="utf-8")
    rows = list(read_rows(str(tmp_path / "d.csv")))
    assert [row.values["prompt"] for row in rows] == ['a, "b"\nc', "e"]
    assert [row.place for row in rows] == ["d.csv:2", "d.csv:5"]


def test_a_text_that_is_longer_than_the_csv_modules_own_limit(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text("text\n" + "x" * 200_000 + "\n")
    (row,) = read_rows(str(tmp_path / "d.csv"))
    assert len(row.values["text"]) == 200_000


@pytest.mark.parametrize(
    ("name", "content", "place", "text"),
    [
        ("d.jsonl", b"", "d.jsonl", "is empty"),
        ("d.jsonl", b"\n\n", "d.jsonl", "is empty"),
        ("d.csv", b"", "d.csv", "is empty"),
        ("d.csv", b"prompt,completion\n", "d.csv", "is empty"),
        ("d.jsonl", b'{"prompt": "a", "completion": "b"}\n{"prompt": "a"', "d.jsonl:2", "is not JSON"),
        ("d.jsonl", b"[1, 2]\n", "d.jsonl:1", "must be a JSON object"),
        ("d.jsonl", b"[" * 100_000 + b"\n", "d.jsonl:1", "is not JSON"),
        (
            "d.jsonl",
            b'{"prompt": "a", "completion": "b"}\n{"prompt": "\xe9"}\n',
            "d.jsonl:2",
            "is not UTF-8 (byte 0xe9",
        ),
        ("d.csv", b"prompt,completion\na,\xff\n", "d.csv:2", "is not UTF-8 (byte 0xff"),
        ("d.csv", b"prompt,completion\na,b\nc\n", "d.csv:3", "has 1 values for the 2 columns"),
        ("d.csv", b"prompt,prompt\na,b\n", "d.csv:1", "names a column twice: prompt"),
        ("d.csv", b'prompt,completion\n"a,b\n', "d.csv:2", "is not CSV"),
        ("d.parquet", b"PAR1 no", "d.parquet", "is not a Parquet file"),
        ("d.txt", b"text", "d.txt", "has a kind that is not read here"),
    ],
)
def test_a_broken_file_is_told_with_its_line(tmp_path: Path, name: str, content: bytes, place: str, text: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        load(tmp_path / name)
    (violation,) = caught.value.violations
    assert violation.field == place
    assert text in violation.description


@pytest.mark.parametrize(
    ("row", "place", "text"),
    [
        ({"prompt": "a"}, "d.jsonl:2, completion", "is missing; the row has prompt"),
        ({"prompt": "a", "completion": None}, "d.jsonl:2, completion", "null"),
        ({"prompt": "a", "completion": 7}, "d.jsonl:2, completion", "must be text, not a number (7)"),
        ({"prompt": ["a"], "completion": "b"}, "d.jsonl:2, prompt", "must be text, not a list"),
        ({"prompt": "a", "completion": True}, "d.jsonl:2, completion", "a truth value"),
        ({"prompt": "a", "completion": " "}, "d.jsonl:2, completion", "is empty"),
        ({"messages": TALK}, "d.jsonl:2, prompt", "is missing; the row has messages"),
        ({"prompt": "a", "completion": "\ud83d"}, "d.jsonl:2, completion", "surrogate"),
    ],
)
def test_a_wrong_field_is_told_with_its_line(tmp_path: Path, row: Any, place: str, text: str) -> None:
    with pytest.raises(DataError) as caught:
        load(write(tmp_path / "d.jsonl", [PAIRS[0], row]))
    (violation,) = caught.value.violations
    assert violation.field == place
    assert text in violation.description


@pytest.mark.parametrize(
    ("messages", "place", "text"),
    [
        ("Hello", "messages", "must be a list of messages, not text"),
        ([], "messages", "an empty list"),
        (TALK[:1], "messages", "must end with a message of the assistant"),
        (TALK[1:], "messages", "no message that the assistant could answer"),
        ([{"role": "user"}, *TALK], "messages[0].content", "missing"),
        ([{"role": "narrator", "content": "x"}, *TALK], "messages[0].role", "must be one of system"),
        (["Hello", *TALK], "messages[0]", "must be an object with role and content"),
        ([{"role": "user", "content": 3}, *TALK], "messages[0].content", "it is a number (3)"),
    ],
)
def test_a_wrong_message_is_told_with_its_place(tmp_path: Path, messages: Any, place: str, text: str) -> None:
    with pytest.raises(DataError) as caught:
        load(write(tmp_path / "d.jsonl", [{"messages": TALK}, {"messages": messages}]))
    (violation,) = caught.value.violations
    assert violation.field == f"d.jsonl:2, {place}"
    assert text in violation.description


def test_columns_that_mean_nothing_here(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", [{"question": "a", "answer": "b"}] * 3)
    with pytest.raises(DataError, match=r"d\.jsonl:1: has the columns question, answer, but training needs"):
        load(path)
    assert len(load(path, prompt_field="question", completion_field="answer", validation_fraction=0).train) == 3


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no data file"):
        load(tmp_path / "d.jsonl")
    with pytest.raises(NotFoundError, match="is a folder"):
        load(tmp_path)


def test_one_giant_row(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", [*PAIRS, {"prompt": "word " * 500, "completion": "x"}])
    with pytest.raises(DataError, match=r"d\.jsonl:11: has \d+ tokens, more than max_length \(100\)"):
        load(path, max_length=100)
    skipped = load(path, max_length=100, long_rows="skip", validation_fraction=0)
    assert (len(skipped.train), skipped.skipped, skipped.truncated) == (10, 1, 0)
    # Its prompt alone fills the sequence, so that nothing would be learned of what is left.
    truncated = load(path, max_length=100, long_rows="truncate", validation_fraction=0)
    assert (len(truncated.train), truncated.skipped, truncated.truncated) == (10, 1, 0)
    whole = load(path, max_length=100, long_rows="truncate", validation_fraction=0, completion_only_loss=False)
    assert (len(whole.train), whole.truncated, whole.longest) == (11, 1, 100)


def test_a_line_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_rows, "MAX_ROW_BYTES", 1000)
    path = write(tmp_path / "d.jsonl", [PAIRS[0], {"prompt": "x" * 2000, "completion": "y"}])
    with pytest.raises(DataError, match=r"d\.jsonl:2: is longer than"):
        load(path)


def test_only_the_answer_is_learned(tmp_path: Path) -> None:
    tokenizer = wrap(byte_level_fast())
    path = write(tmp_path / "d.jsonl", PAIRS[:1])
    row = load(path, validation_fraction=0).train[0]
    learned = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
    assert tokenizer.decode(learned) == "It is 0.<|im_end|>\n"
    everything = load(path, validation_fraction=0, completion_only_loss=False).train[0]
    assert everything["labels"] == everything["input_ids"] == row["input_ids"]


def test_plain_prompts_end_with_the_end_of_text(tmp_path: Path) -> None:
    tokenizer = wrap(byte_level_fast(), chat_template=None)
    config = TrainConfig("m", str(write(tmp_path / "d.jsonl", PAIRS[:1])), "out", validation_fraction=0)
    row = load_data(config, tokenizer).train[0]
    learned = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
    assert tokenizer.decode(learned) == "It is 0.</s>"
    assert row["input_ids"][0] == tokenizer.bos_token_id


def test_every_answer_of_a_conversation_is_learned(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", [{"messages": [*TALK, {"role": "user", "content": "again"}, TALK[1]]}])
    row = load(path, validation_fraction=0).train[0]
    text = "".join(
        str(wrap(byte_level_fast()).decode([token])) if label != -100 else "#"
        for token, label in zip(row["input_ids"], row["labels"], strict=True)
    )
    assert text.replace("#", "") == "world<|im_end|>\nworld<|im_end|>\n"


def test_a_template_that_hides_earlier_turns_is_refused(tmp_path: Path) -> None:
    tokenizer = wrap(byte_level_fast())
    tokenizer.chat_template = (
        "{% for m in messages %}{% if loop.last or m.role == 'user' %}<|im_start|>{{ m.content }}<|im_end|>"
        "{% endif %}{% endfor %}"
    )
    path = write(tmp_path / "d.jsonl", [{"messages": [*TALK, {"role": "user", "content": "again"}, TALK[1]]}])
    with pytest.raises(DataError, match="renders earlier turns otherwise"):
        load_data(TrainConfig("m", str(path), "out", validation_fraction=0), tokenizer)


def test_a_template_that_fails_is_told_with_the_line(tmp_path: Path) -> None:
    tokenizer = wrap(byte_level_fast())
    tokenizer.chat_template = "{{ raise_exception('no system message') }}"
    path = write(tmp_path / "d.jsonl", PAIRS)
    with pytest.raises(DataError, match=r"d\.jsonl:\d+: cannot be rendered .* no system message"):
        load_data(TrainConfig("m", str(path), "out"), tokenizer)


def test_a_conversation_needs_a_template(tmp_path: Path) -> None:
    config = TrainConfig("m", str(write(tmp_path / "d.jsonl", [{"messages": TALK}] * 2)), "out")
    with pytest.raises(InvalidRequestError, match="no chat template"):
        load_data(config, wrap(byte_level_fast(), chat_template=None))


def test_labels(tmp_path: Path) -> None:
    rows = [{"text": f"row {n}", "label": n % 2} for n in range(10)]
    data = load(write(tmp_path / "d.jsonl", rows), task="sequence-classification")
    assert data.labels == ("0", "1")
    assert set(data.train["labels"]) == {0, 1}
    with pytest.raises(InvalidRequestError, match="has 1 label"):
        load(write(tmp_path / "d.jsonl", [{**row, "label": "a"} for row in rows]), task="sequence-classification")
    with pytest.raises(DataError, match=r"d\.jsonl:11, label: must be text or a whole number"):
        load(write(tmp_path / "d.jsonl", [*rows, {"text": "x", "label": 0.5}]), task="sequence-classification")


def test_other_validation_data(tmp_path: Path) -> None:
    other = write(tmp_path / "v.jsonl", PAIRS[:3])
    data = load(write(tmp_path / "d.jsonl", PAIRS), validation_data=str(other))
    assert (len(data.train), len(data.validation), data.held_out[0].place) == (10, 3, "v.jsonl:1")


@given(
    prompts=st.lists(st.integers(0, 20), min_size=1, max_size=60),
    fraction=st.floats(0, 0.9),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_split_shares_no_prompt_and_loses_no_row(prompts: list[int], fraction: float, seed: int) -> None:
    rows = [Sample(f"d:{index}", prompt=str(prompt), completion="x") for index, prompt in enumerate(prompts)]
    train, held_out = split(rows, fraction, seed)
    assert sorted(row.place for row in (*train, *held_out)) == sorted(row.place for row in rows)
    assert not {row.prompt for row in train} & {row.prompt for row in held_out}
    assert train
    assert bool(held_out) == (fraction > 0 and len(set(prompts)) > 1)
    assert split(rows, fraction, seed) == (train, held_out)
