"""Write the training and held-out rows of the example adapters to `data/<task>.{train,test}.jsonl`.

Everything is made from the word lists in `words.json` and the templates in this file with a fixed seed, so the files
can be made again byte for byte. A held-out row shares no row with training, and none of the words that carry its
meaning: other adjectives and things (sentiment), other tables (sql), other dates (date), other people, goods and cities
(json).

Run: python adapters/examples/make_data.py
"""

from __future__ import annotations

import calendar
import datetime
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
DATA = HERE / "data"
TRAIN_ROWS = 960
TEST_ROWS = 120

Row = dict[str, str]
WORDS: dict[str, Any] = json.loads((HERE / "words.json").read_text(encoding="utf-8"))

SENTIMENT_PROMPT = "Is this review positive or negative? Answer with one word.\n{text}"
# `same` and `opposite` are adjectives of the row's own label and of the other one; `an_` puts the article before them.
SENTIMENT_TEMPLATES = [
    "The {thing} was {same}.",
    "What {an_same} {thing}!",
    "I found the {thing} really {same}.",
    "The {thing} was {same} from beginning to end.",
    "The {thing} was not {opposite} at all.",
    "Nobody could call this {thing} {opposite}.",
    "I expected {an_opposite} {thing}, but it was {same}.",
    "The {thing} used to be {opposite}. Now it is {same}.",
    "My friends called the {thing} {opposite}, yet I thought it was {same}.",
    "The start was {opposite}, but in the end the {thing} was {same}.",
]

SQL_PROMPT = "Write one SQL query.\nTable: {table} ({columns})\nQuestion: {question}"
# A question and its query: text column t, filter column f with value v, number column n, threshold k, limit l.
SQL_TEMPLATES = [
    ("How many {table} are there?", "SELECT COUNT(*) FROM {table};"),
    ("Show the {t} of all {table}.", "SELECT {t} FROM {table};"),
    ("Show the {t} and {n} of all {table}.", "SELECT {t}, {n} FROM {table};"),
    ("Which {table} have the {f} {v}?", "SELECT * FROM {table} WHERE {f} = '{v}';"),
    ("How many {table} have the {f} {v}?", "SELECT COUNT(*) FROM {table} WHERE {f} = '{v}';"),
    ("Show the {t} of {table} with {f} {v}.", "SELECT {t} FROM {table} WHERE {f} = '{v}';"),
    ("Which {table} have {n} above {k}?", "SELECT * FROM {table} WHERE {n} > {k};"),
    ("Which {table} have {n} below {k}?", "SELECT * FROM {table} WHERE {n} < {k};"),
    ("What is the average {n} of the {table}?", "SELECT AVG({n}) FROM {table};"),
    ("What is the highest {n} of the {table}?", "SELECT MAX({n}) FROM {table};"),
    ("What is the lowest {n} of the {table}?", "SELECT MIN({n}) FROM {table};"),
    ("What is the total {n} of the {table}?", "SELECT SUM({n}) FROM {table};"),
    ("Show the {l} {table} with the highest {n}.", "SELECT * FROM {table} ORDER BY {n} DESC LIMIT {l};"),
    ("Show the {l} {table} with the lowest {n}.", "SELECT * FROM {table} ORDER BY {n} LIMIT {l};"),
    ("What is the average {n} per {f}?", "SELECT {f}, AVG({n}) FROM {table} GROUP BY {f};"),
    ("How many {table} are there per {f}?", "SELECT {f}, COUNT(*) FROM {table} GROUP BY {f};"),
]

DATE_PROMPT = "Give the date in this text as YYYY-MM-DD.\n{text}"
DATE_TEMPLATES = [
    "{date}",
    "The meeting is on {date}.",
    "Please pay the invoice by {date}.",
    "She was born on {date} in Leeds.",
    "The shop opens again on {date}.",
    "Our contract ends on {date}.",
]
DATE_FORMATS = ["{d} {month} {y}", "{month} {d}, {y}", "{month} {nth}, {y}", "the {nth} of {month} {y}"]
FIRST_DAY = datetime.date(1950, 1, 1)
DAYS = 36_500

JSON_PROMPT = "Extract name, item, count and city as JSON.\n{text}"
JSON_TEMPLATES = [
    "{name} from {city} ordered {count} {item}.",
    "Please send {count} {item} to {name} in {city}.",
    "{name} wants {count} {item} delivered to {city}.",
    "We shipped {count} {item} to {city} for {name}.",
    "In {city}, {name} bought {count} {item}.",
    "An order came in from {city}: {count} {item} for {name}.",
]
NUMBER_WORDS = ["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]


def sentiment(rng: random.Random, split: str) -> Row:
    """Return a one-sentence review with its label; most templates hold a negation or a contrast."""
    words = WORDS["sentiment"][split]
    label, other = rng.choice([("positive", "negative"), ("negative", "positive")])
    same, opposite = rng.choice(words[label]), rng.choice(words[other])
    text = rng.choice(SENTIMENT_TEMPLATES).format(
        thing=rng.choice(words["thing"]),
        same=same,
        opposite=opposite,
        an_same=with_article(same),
        an_opposite=with_article(opposite),
    )
    return {"prompt": SENTIMENT_PROMPT.format(text=text), "completion": label}


def with_article(word: str) -> str:
    """Return `word` after "a" or "an", by its first letter."""
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def sql(rng: random.Random, split: str) -> Row:
    """Return a question about one table, whose schema the prompt shows, with its query."""
    table = rng.choice(sorted(WORDS["sql"][split]))
    columns = WORDS["sql"][split][table]["columns"]
    slots = {
        "table": table,
        "t": columns[0],
        "f": columns[2],
        "v": rng.choice(WORDS["sql"][split][table]["values"]),
        "n": rng.choice([columns[1], columns[3]]),
        "k": rng.randrange(2, 1000),
        "l": rng.randrange(2, 20),
    }
    question, query = rng.choice(SQL_TEMPLATES)
    prompt = SQL_PROMPT.format(table=table, columns=", ".join(columns), question=question.format(**slots))
    return {"prompt": prompt, "completion": query.format(**slots)}


def date(rng: random.Random, split: str) -> Row:
    """Return a text with an English date of 1950 to 2049, and the date in ISO form; every fourth day is held out."""
    offset = rng.randrange(DAYS // 4) * 4 + (3 if split == "test" else rng.randrange(3))
    day = FIRST_DAY + datetime.timedelta(days=offset)
    suffix = "th" if 11 <= day.day <= 13 else {1: "st", 2: "nd", 3: "rd"}.get(day.day % 10, "th")
    written = rng.choice(DATE_FORMATS).format(
        d=day.day, nth=f"{day.day}{suffix}", month=calendar.month_name[day.month], y=day.year
    )
    return {"prompt": DATE_PROMPT.format(text=rng.choice(DATE_TEMPLATES).format(date=written)), "completion": str(day)}


def json_record(rng: random.Random, split: str) -> Row:
    """Return a sentence about an order with its record; the count is a word or a number, and a number in the record."""
    fields = {key: rng.choice(values) for key, values in WORDS["json"][split].items()}
    if rng.random() < 0.5:
        index = rng.randrange(len(NUMBER_WORDS))
        count, written = index + 2, NUMBER_WORDS[index]
    else:
        count = rng.randrange(2, 100)
        written = str(count)
    text = rng.choice(JSON_TEMPLATES).format(**fields, count=written)
    record = {"name": fields["name"], "item": fields["item"], "count": count, "city": fields["city"]}
    return {"prompt": JSON_PROMPT.format(text=text), "completion": json.dumps(record)}


TASKS: dict[str, Callable[[random.Random, str], Row]] = {
    "sentiment": sentiment,
    "sql": sql,
    "date": date,
    "json": json_record,
}


def rows_of(task: str, split: str, count: int) -> list[Row]:
    """Return `count` different rows of `task`; `split` is "train" or "test". The same arguments give the same rows."""
    rng = random.Random(f"{task}-{split}")
    rows: dict[str, Row] = {}
    while len(rows) < count:
        row = TASKS[task](rng, split)
        rows.setdefault(row["prompt"], row)
    return list(rows.values())


def main() -> None:
    """Write the two files of every task."""
    DATA.mkdir(exist_ok=True)
    for task in TASKS:
        for split, count in (("train", TRAIN_ROWS), ("test", TEST_ROWS)):
            lines = (json.dumps(row, ensure_ascii=False) for row in rows_of(task, split, count))
            (DATA / f"{task}.{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
