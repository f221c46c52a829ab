"""Whole training runs on a tiny model, against PEFT and transformers reading what was written."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from loraplex.adapters.errors import AlreadyExistsError, InvalidRequestError, NotFoundError, ResourceExhaustedError
from loraplex.adapters.training import TrainConfig, run_folder, train, trainer
from loraplex.adapters.training.failures import TrainingInterruptedError
from loraplex.adapters.training.training_data import load_data
from tests.parity.training_setup import ROWS, Watcher, save_base, tiny_run

VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {"quantization": "none"},
    "nf4": {},
    "fp4-single-quant": {"quantization": "fp4", "double_quant": False},
    "int8": {"quantization": "int8"},
    "dora": {"use_dora": True},
    "rslora-loraplus": {"use_rslora": True, "loraplus_lr_ratio": 8.0},
    "pissa": {"quantization": "none", "init_lora_weights": "pissa"},
    "eva": {"init_lora_weights": "eva"},
    "gaussian": {"init_lora_weights": "gaussian"},
    "patterns": {
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "rank_pattern": {"v_proj": 8},
        "alpha_pattern": {"v_proj": 32},
    },
    "lm_head": {"modules_to_save": ["lm_head"], "target_modules": r".*\.layers\.1\..*proj"},
    "packing": {"packing": True, "max_length": 64},
    "accumulating-checkpointing": {"gradient_checkpointing": True, "gradient_accumulation_steps": 2},
    "whole-text-loss": {"completion_only_loss": False},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


def reloaded_loss(config: TrainConfig) -> float:
    """The adapter's loss on the held-out rows, row by row, by PEFT from the folder that was written."""
    quantization: Any = None
    if config.quantization in ("nf4", "fp4"):
        make: Any = BitsAndBytesConfig
        quantization = make(
            load_in_4bit=True, bnb_4bit_quant_type=config.quantization, bnb_4bit_use_double_quant=config.double_quant
        )
    elif config.quantization == "int8":
        quantization = BitsAndBytesConfig(load_in_8bit=True)
    base = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32, quantization_config=quantization)
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010
    model = peft.PeftModel.from_pretrained(base, config.output_dir).eval()
    rows = load_data(config, AutoTokenizer.from_pretrained(config.model)).validation
    losses = []
    with torch.no_grad():
        for row in rows:
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
            losses.append(model(input_ids=ids, labels=labels).loss.item())
    return sum(losses) / len(losses)


@pytest.mark.parametrize("name", VARIANTS)
def test_what_was_measured_is_what_was_written(base: Path, tmp_path: Path, name: str) -> None:
    config = tiny_run(base, tmp_path, per_device_batch_size=1, **VARIANTS[name])
    result = train(config)
    assert result.serving_problem == ""
    assert result.base is not None
    assert result.adapter is not None
    assert result.adapter.loss < result.base.loss
    # One row a batch, so that both average over rows.
    assert reloaded_loss(config) == pytest.approx(result.adapter.loss, rel=1e-4)
    written = json.loads((tmp_path / "adapter" / "metrics.json").read_text())
    assert written["adapter"]["loss"] == result.adapter.loss
    assert TrainConfig.from_yaml(tmp_path / "adapter" / "train.yaml") == config
    assert not list(config.run_dir.glob("checkpoint-*"))


def test_training_learns(base: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"Row {n}", "completion": "yes"} for n in range(40)]
    result = train(tiny_run(base, tmp_path, rows, max_steps=25, learning_rate=3e-2, chat="no"))
    assert result.base is not None
    assert result.adapter is not None
    assert (result.base.accuracy, result.adapter.accuracy) == (0.0, 1.0)
    assert {adapter.text.strip() for _, adapter in result.answers} == {"yes"}
    assert "| base with this adapter |" in (tmp_path / "adapter" / "README.md").read_text()


@pytest.mark.parametrize("name", ["nf4", "pissa", "eva", "packing", "rslora-loraplus"])
def test_an_interrupted_run_ends_with_the_same_weights(base: Path, tmp_path: Path, name: str) -> None:
    whole = tiny_run(base, tmp_path / "whole", **VARIANTS[name])
    train(whole)
    cut = tiny_run(base, tmp_path / "cut", **VARIANTS[name])
    watcher = Watcher(stop_after=2)
    with pytest.raises(TrainingInterruptedError, match="stopped after step 3 of 6"):
        train(cut, watcher, watcher.stop)
    assert not (tmp_path / "cut" / "adapter").exists()
    second = Watcher()
    result = train(cut, second, resume=True)
    assert [each.step for each in second.steps] == [4, 5, 6]
    assert result.steps == 6
    weights = [(tmp_path / run / "adapter" / "adapter_model.safetensors").read_bytes() for run in ("whole", "cut")]
    assert weights[0] == weights[1]


def test_a_run_that_is_killed_in_a_step_goes_on_from_its_last_checkpoint(base: Path, tmp_path: Path) -> None:
    whole = tiny_run(base, tmp_path / "whole")
    train(whole)

    def die(step: int) -> None:
        if step == 5:
            raise KeyboardInterrupt

    cut = tiny_run(base, tmp_path / "cut")
    with pytest.raises(KeyboardInterrupt):
        train(cut, Watcher(on_step=die))
    # What a power cut leaves of a save: a later checkpoint that is not whole.
    half = cut.run_dir / "checkpoint-5"
    shutil.copytree(cut.run_dir / "checkpoint-4", half)
    (half / "whole").unlink()
    (half / "optimizer.pt").write_bytes(b"half")
    second = Watcher()
    train(cut, second, resume=True)
    assert [each.step for each in second.steps] == [5, 6]
    weights = [load_file(tmp_path / run / "adapter" / "adapter_model.safetensors") for run in ("whole", "cut")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_what_a_run_is_resumed_with(base: Path, tmp_path: Path) -> None:
    config = tiny_run(base, tmp_path)
    with pytest.raises(NotFoundError, match="no run to resume"):
        train(config, resume=True)
    watcher = Watcher(stop_after=1)
    with pytest.raises(TrainingInterruptedError):
        train(config, watcher, watcher.stop)
    with pytest.raises(AlreadyExistsError, match=r"checkpoint-2 of an earlier run: go on with --resume"):
        train(config)
    with pytest.raises(InvalidRequestError, match=r"learning_rate: was 0\.01 when the run began and is 0\.02"):
        train(tiny_run(base, tmp_path, learning_rate=2e-2), resume=True)
    with pytest.raises(InvalidRequestError, match="data: has changed"):
        train(tiny_run(base, tmp_path, rows=ROWS[1:]), resume=True)
    # None of this has touched the checkpoint.
    train(tiny_run(base, tmp_path, logging_steps=1), resume=True)


def test_early_stopping_takes_the_best_checkpoint(base: Path, tmp_path: Path) -> None:
    config = tiny_run(
        base, tmp_path, max_steps=40, learning_rate=0.3, eval_steps=2, early_stopping_patience=2, warmup_ratio=0.0
    )
    result = train(config, watcher := Watcher())
    assert result.stopped_early
    assert result.adapter is not None
    losses = [float(note.rpartition(" ")[2]) for note in watcher.notes if "validation loss" in note]
    assert result.adapter.loss == pytest.approx(min(losses), abs=1e-4)


def test_conversations_and_texts(base: Path, tmp_path: Path) -> None:
    talk = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "yes"}]} for n in range(9)
    ]
    result = train(tiny_run(base, tmp_path / "talk", talk))
    assert result.adapter is not None
    assert result.adapter.rows == 1
    texts = [{"text": f"The number {n} follows {n - 1}."} for n in range(9)]
    result = train(tiny_run(base, tmp_path / "text", texts, tensorboard=False))
    assert result.adapter is not None
    assert (result.adapter.rows, result.adapter.accuracy) == (0, None)


def test_a_template_of_its_own_is_kept_with_the_adapter(base: Path, tmp_path: Path) -> None:
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}</s>{% endfor %}"
    template += "{% if add_generation_prompt %}[assistant] {% endif %}"
    (tmp_path / "own.jinja").write_text(template)
    train(tiny_run(base, tmp_path, chat_template=str(tmp_path / "own.jinja"), max_steps=1))
    assert (tmp_path / "adapter" / "chat_template.jinja").read_text() == template


def test_tensorboard_shows_the_run(base: Path, tmp_path: Path) -> None:
    config = tiny_run(base, tmp_path, logging_steps=2)
    result = train(config)
    log: Any = EventAccumulator(str(config.run_dir / "logs"))
    log.Reload()
    assert [(event.step, event.value) for event in log.Scalars("train/loss")] == [
        (step, pytest.approx(loss)) for step, loss in result.losses
    ]
    assert [event.step for event in log.Scalars("eval/loss")] == [1, 2, 3, 4, 5, 6]
    assert len(list((config.run_dir / "logs").iterdir())) == 1


@pytest.mark.parametrize(
    ("settings", "field", "text"),
    [
        ({"target_modules": ["q_proj", "v_porj"]}, "target_modules", "v_porj matches no module of the model; did you"),
        ({"target_modules": r".*\.attn\..*"}, "target_modules", "matches no module"),
        ({"target_modules": "("}, "target_modules", "is no regular expression"),
        ({"target_modules": ["lm_head"]}, "target_modules", "put it in modules_to_save"),
        ({"target_modules": ["input_layernorm"]}, "target_modules", "cannot be adapted by PEFT"),
        ({"rank_pattern": {"c_attn": 8}}, "rank_pattern", "c_attn matches no module"),
        ({"modules_to_save": ["score"]}, "modules_to_save", "score matches no module"),
    ],
)
def test_a_target_that_does_not_exist(
    base: Path, tmp_path: Path, settings: dict[str, Any], field: str, text: str
) -> None:
    config = tiny_run(base, tmp_path, **settings)
    with pytest.raises(InvalidRequestError) as caught:
        train(config)
    (violation,) = caught.value.violations
    assert violation.field == field
    assert text in violation.description
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl"]


def test_an_output_that_exists_is_left_alone(base: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    with pytest.raises(AlreadyExistsError):
        train(tiny_run(base, tmp_path))
    assert not list((tmp_path / "adapter").iterdir())


def test_bad_data_leaves_nothing(base: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match=r"data\.jsonl:2, completion: is missing"):
        train(tiny_run(base, tmp_path, [ROWS[0], {"prompt": "x"}]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl"]


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
    ids=["gpu", "cpu"],
)
def test_no_memory_keeps_the_checkpoints(base: Path, tmp_path: Path, error: Exception) -> None:
    def fail(step: int) -> None:
        if step == 3:
            raise error

    config = tiny_run(base, tmp_path)
    with pytest.raises(ResourceExhaustedError, match="not enough memory for training: lower per_device_batch_size"):
        train(config, Watcher(on_step=fail))
    assert not (tmp_path / "adapter").exists()
    assert [path.name for path in config.run_dir.glob("checkpoint-*")] == ["checkpoint-2"]
    train(config, resume=True)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
        # What safetensors raises is a bare Exception.
        Exception("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=["python", "torch", "safetensors"],
)
def test_a_full_disk_keeps_the_checkpoints(
    base: Path, tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(folder: Path) -> None:
        raise error

    whole = tmp_path / "whole"
    train(tiny_run(base, whole))
    config = tiny_run(base, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "sync_folder", fail)
        with pytest.raises(ResourceExhaustedError, match=r"disk is full while training \(whole checkpoints are kept"):
            train(config)
    # No adapter, nothing that was to become one, and what was trained is there.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter.run", "data.jsonl", "whole"]
    watcher = Watcher()
    assert train(config, watcher, resume=True).steps == 6
    assert watcher.steps == []
    weights = [(folder / "adapter" / "adapter_model.safetensors").read_bytes() for folder in (whole, tmp_path)]
    assert weights[0] == weights[1]


def test_no_room_for_the_checkpoints_is_told_before_training(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_folder, "free_bytes", lambda folder: 100_000)
    watcher = Watcher()
    with pytest.raises(ResourceExhaustedError, match=r"the checkpoints need 0 MB and .* has room for 0"):
        train(tiny_run(base, tmp_path), watcher)
    assert watcher.steps == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl"]
