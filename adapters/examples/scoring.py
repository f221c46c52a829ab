"""Score what a model wrote against the expected answer, strictly and leniently.

Strict: the first line is the answer and nothing else. Lenient is fair to a model that was never told how to phrase its
answer: the right meaning anywhere in the text counts, however it is wrapped.
"""

from __future__ import annotations

import json
import re
import sqlite3

LABELS = ("positive", "negative")


def strict(completion: str, expected: str) -> bool:
    """Return whether the first line of `completion` is `expected`, white space around it aside."""
    lines = completion.strip().splitlines()
    return bool(lines) and lines[0].strip() == expected


def lenient(task: str, prompt: str, completion: str, expected: str) -> bool:
    """Return whether `completion` holds the right answer to `prompt` in any wrapping.

    sentiment: the right label occurs and the other does not. sql: the first query in the text returns what the expected
    one does on a filled table. json: the first object in the text has the same members. Others: the answer occurs.
    """
    if strict(completion, expected):
        return True
    if task == "sentiment":
        found = {label for label in LABELS if label in completion.lower()}
        return found == {expected}
    if task == "sql":
        return _same_result(prompt, completion, expected)
    if task == "json":
        return _same_object(completion, expected)
    return expected in completion


def _same_object(completion: str, expected: str) -> bool:
    start = completion.find("{")
    if start < 0:
        return False
    try:
        found, _ = json.JSONDecoder().raw_decode(completion[start:])
    except json.JSONDecodeError:
        return False
    return bool(found == json.loads(expected))


def _same_result(prompt: str, completion: str, expected: str) -> bool:
    """Run both queries against the table that `prompt` describes, filled so that different queries differ."""
    match = re.search(r"\bselect\b[^;`]*", completion, re.IGNORECASE)
    schema = re.search(r"^Table: (\w+) \((.*)\)$", prompt, re.MULTILINE)
    if match is None or schema is None:
        return False
    table, columns = schema[1], schema[2].split(", ")
    value = re.search(r"'(.*)'", expected)
    threshold = re.search(r"[<>] (\d+)", expected)
    middle = int(threshold[1]) if threshold else 50
    with sqlite3.connect(":memory:") as database:
        database.execute(f"CREATE TABLE {table} ({columns[0]}, {columns[1]} INT, {columns[2]}, {columns[3]} INT)")
        for index in range(40):
            group = value[1] if value and index % 3 == 0 else f"group {index % 5}"
            row = (f"row {index}", middle + index * 7 % 40 - 20, group, middle + index * 11 % 40 - 20)
            database.execute(f"INSERT INTO {table} VALUES (?, ?, ?, ?)", row)
        try:
            found = database.execute(match[0]).fetchall()
        except sqlite3.Error:
            return False
        return found == database.execute(expected).fetchall()
