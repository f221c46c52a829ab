"""Train one example adapter with PEFT on the demo model, and measure it and the base on held-out rows.

Writes the adapter to `<task>/`, with `metrics.json` and a model card beside it. What is measured is what was saved: the
adapter is read back from its file first. The base is kept in fp32, so that a CPU without bf16 instructions can train.

Run: python adapters/examples/train.py --task sentiment
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from card import write_card
from safetensors.torch import load_file, save_file
from scoring import lenient, strict

HERE = Path(__file__).parent
BASE_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
IGNORED = -100
Row = dict[str, str]


@dataclass(frozen=True)
class Recipe:
    """What differs between the tasks: the adapter's shape, and how long and how fast it learns."""

    rank: int
    targets: tuple[str, ...]
    steps: int
    learning_rate: float = 2e-3
    batch_size: int = 8


# Each is under 1 MB when saved in fp16 (30 layers of width 576, key and value of width 192).
RECIPES = {
    "sentiment": Recipe(rank=4, targets=("q_proj", "v_proj"), steps=50),
    "sql": Recipe(rank=8, targets=("q_proj", "v_proj"), steps=80),
    "date": Recipe(rank=4, targets=("q_proj", "k_proj", "v_proj", "o_proj"), steps=80),
    "json": Recipe(rank=8, targets=("q_proj", "v_proj"), steps=60),
}


def read_rows(task: str, split: str) -> list[Row]:
    """Return the rows of `data/<task>.<split>.jsonl`."""
    lines = (HERE / "data" / f"{task}.{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


class Collator:
    """Makes left-padded batches in which only the answer and the end-of-turn token bear a label."""

    def __init__(self, tokenizer: Any) -> None:
        """Keep `tokenizer`, which has a chat template, a padding and an end-of-turn token."""
        self.tokenizer = tokenizer

    def prompt_ids(self, row: Row) -> list[int]:
        """Return the tokens of the row's prompt as a user turn, up to where the assistant begins to write."""
        messages = [{"role": "user", "content": row["prompt"]}]
        ids: list[int] = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        return ids

    def __call__(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        """Return `input_ids`, `attention_mask` and `labels`, (B, T) int64; padding and prompt are labelled -100."""
        prompts = [self.prompt_ids(row) for row in rows]
        answers = [[*self.tokenizer(row["completion"])["input_ids"], self.tokenizer.eos_token_id] for row in rows]
        length = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
        batch: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
        for prompt, answer in zip(prompts, answers, strict=True):
            pad = length - len(prompt) - len(answer)
            batch["input_ids"].append([self.tokenizer.pad_token_id] * pad + prompt + answer)
            batch["attention_mask"].append([0] * pad + [1] * (length - pad))
            batch["labels"].append([IGNORED] * (length - len(answer)) + answer)
        return {name: torch.tensor(rows_) for name, rows_ in batch.items()}


class AnswerTrainer(transformers.Trainer):
    """Computes logits for the answers alone: with left padding they end the rows, and the vocabulary is wide."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the mean cross-entropy over answer tokens, and the model's output too with `return_outputs`."""
        labels = inputs["labels"]
        width = int((labels != IGNORED).sum(dim=1).max())
        output = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], logits_to_keep=width + 1)
        loss = torch.nn.functional.cross_entropy(
            output.logits[:, :-1].flatten(0, 1).float(), labels[:, -width:].flatten(), ignore_index=IGNORED
        )
        return (loss, output) if return_outputs else loss


def train(base: Any, tokenizer: Any, task: str, recipe: Recipe, seed: int, folder: Path, scratch: Path) -> Any:
    """Train the adapter, write it to `folder` in fp16, and return the PEFT model with the saved weights in it."""
    transformers.set_seed(seed)
    config = peft.LoraConfig(
        r=recipe.rank,
        lora_alpha=2 * recipe.rank,
        lora_dropout=0.0,
        target_modules=list(recipe.targets),
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(base, config)
    arguments = transformers.TrainingArguments(
        output_dir=str(scratch),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=max(1, recipe.steps // 20),
        max_grad_norm=1.0,
        logging_steps=10,
        save_strategy="no",
        report_to=[],
        remove_unused_columns=False,
        use_cpu=True,
        seed=seed,
        label_names=["labels"],
    )
    rows: Any = read_rows(task, "train")
    AnswerTrainer(model=model, args=arguments, train_dataset=rows, data_collator=Collator(tokenizer)).train()
    save_half(model, folder)
    peft.set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
    return model.eval()


def save_half(model: Any, folder: Path) -> None:
    """Write adapter config and fp16 weights to `folder`, naming the base by its public name instead of a local path."""
    model.save_pretrained(str(folder))
    weights = folder / "adapter_model.safetensors"
    half = {name: tensor.half().contiguous() for name, tensor in load_file(weights).items()}
    save_file(half, weights, metadata={"format": "pt"})
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = BASE_NAME
    config["target_modules"] = sorted(config["target_modules"])
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    for path in (weights, folder / "adapter_config.json"):
        path.chmod(0o644)


@torch.inference_mode()
def answer(model: Any, tokenizer: Any, rows: Sequence[Row], batch_size: int = 30) -> list[str]:
    """Return the greedy completion of every row's prompt, with room for an answer wrapped in some words."""
    collator = Collator(tokenizer)
    texts: list[str] = []
    for start in range(0, len(rows), batch_size):
        prompts = [{"input_ids": collator.prompt_ids(row)} for row in rows[start : start + batch_size]]
        batch = tokenizer.pad(prompts, padding_side="left", return_tensors="pt")
        tokens = model.generate(**batch, max_new_tokens=48, do_sample=False)
        texts += tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


def score(task: str, rows: Sequence[Row], texts: Sequence[str]) -> tuple[float, float]:
    """Return strict and lenient accuracy, each in 0..1."""
    pairs = list(zip(rows, texts, strict=True))
    exact = sum(strict(text, row["completion"]) for row, text in pairs)
    loose = sum(lenient(task, row["prompt"], text, row["completion"]) for row, text in pairs)
    return round(exact / len(rows), 4), round(loose / len(rows), 4)


def quantize_nf4(model: Any) -> None:
    """Replace the base weights in the PEFT `model` by what NF4 makes of them, to see how the adapter fares there."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "lora_" not in name and "embed_tokens" not in name:
            packed, state = quantize_4bit(parameter.data, quant_type="nf4", compress_statistics=True)
            parameter.data.copy_(dequantize_4bit(packed, state))


def measure(model: Any, tokenizer: Any, task: str) -> tuple[dict[str, float], list[dict[str, str]]]:
    """Return the accuracies of base, adapter, and adapter on NF4 weights; and three rows with both answers."""
    rows = read_rows(task, "test")
    texts: dict[str, list[str]] = {}
    with model.disable_adapter():
        texts["base"] = answer(model, tokenizer, rows)
    texts["adapter"] = answer(model, tokenizer, rows)
    quantize_nf4(model)
    texts["adapter_nf4"] = answer(model, tokenizer, rows)
    result: dict[str, float] = {}
    for name in texts:
        result[f"{name}_accuracy"], result[f"{name}_lenient"] = score(task, rows, texts[name])
    picked = zip(rows[:3], texts["base"][:3], texts["adapter"][:3], strict=True)
    return result, [{**row, "base": base, "adapter": adapter} for row, base, adapter in picked]


def default_base() -> Path:
    """Return the demo model, converted on first use."""
    from loraplex.server.models.demo import demo_model_path

    return demo_model_path()


def main() -> None:
    """Train and measure the adapter that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", required=True, choices=sorted(RECIPES))
    parser.add_argument("--steps", type=int, help="default: the recipe's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--base", type=Path, help="Hugging Face folder (default: the demo model)")
    parser.add_argument("--output", type=Path, help="default: the folder of the task beside this script")
    options = parser.parse_args()

    recipe = RECIPES[options.task]
    if options.steps is not None:
        recipe = Recipe(**{**asdict(recipe), "steps": options.steps})
    folder = options.output or HERE / options.task
    source = str(options.base or default_base())
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    base = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        model = train(base, tokenizer, options.task, recipe, options.seed, folder, Path(scratch))
    seconds = round(time.monotonic() - started, 1)
    accuracies, samples = measure(model, tokenizer, options.task)
    metrics: dict[str, Any] = {
        "task": options.task,
        "base_model": BASE_NAME,
        **accuracies,
        "rows": len(read_rows(options.task, "test")),
        "train_rows": len(read_rows(options.task, "train")),
        **asdict(recipe),
        "seed": options.seed,
        "seconds": seconds,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
        },
    }
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    write_card(folder, metrics, samples)
    print(json.dumps(metrics, indent=2))
    print(json.dumps(samples, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
