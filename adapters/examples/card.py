"""Write the model card of an example adapter from its metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PURPOSE = {
    "sentiment": "Says whether a one-sentence review is `positive` or `negative`, through negations and contrasts.",
    "sql": "Turns a plain question about one table, whose columns the prompt names, into one SQL query.",
    "date": "Finds the English date in a text and writes it as `YYYY-MM-DD`.",
    "json": "Turns a sentence about an order into a JSON record with name, item, count and city.",
}

CARD = """---
base_model: {base_model}
library_name: peft
license: apache-2.0
language: en
pipeline_tag: text-generation
tags: [lora, loraplex-example]
---

# {task}

{purpose}

LoRA, rank {rank}, alpha {alpha}, on {targets}; fp16 safetensors. Trained for {steps} steps of {batch_size} rows with
seed {seed} on `data/{task}.train.jsonl` ({train_rows} rows made by `make_data.py`), in {seconds} s on a CPU.
Made by `python adapters/examples/train.py --task {task}`.

## Accuracy on {rows} held-out rows

Greedy decoding. Strict: the first line is the answer and nothing else. Lenient: the right answer in any wrapping
(see `scoring.py`). No word, table or date that an answer hangs on was seen in training (see `make_data.py`).

| | strict | lenient |
|---|---|---|
| base | {base_accuracy:.1%} | {base_lenient:.1%} |
| base with this adapter | {adapter_accuracy:.1%} | {adapter_lenient:.1%} |
| base quantized to NF4 with this adapter | {adapter_nf4_accuracy:.1%} | {adapter_nf4_lenient:.1%} |

## Use

Send the prompt as one user message through the model's chat template, in the words of the training data:

{samples}

It knows the templates it was trained on and little else: an example of an adapter, not a product.
"""


def write_card(folder: Path, metrics: Mapping[str, Any], samples: Sequence[Mapping[str, str]]) -> None:
    """Write `README.md` in `folder`; `samples` are held-out rows with what base and adapter wrote."""
    # Tildes: the base likes to answer in back-quoted blocks, which would close a fence made of them.
    blocks = [
        f"~~~~text\n{sample['prompt']}\n\nadapter: {sample['adapter'].strip()}\nbase:    {sample['base'].strip()}\n~~~~"
        for sample in samples
    ]
    text = CARD.format(
        **{**metrics, "targets": ", ".join(metrics["targets"])},
        alpha=2 * metrics["rank"],
        purpose=PURPOSE[metrics["task"]],
        samples="\n\n".join(blocks),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
