"""Merges that are refused or fail: each says why, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraplex.adapters import merge
from loraplex.adapters.binding import BoundAdapter, ModuleWeights, bind
from loraplex.adapters.errors import (
    AdapterFormatError,
    AlreadyExistsError,
    InvalidRequestError,
    PreconditionError,
    ResourceExhaustedError,
)
from loraplex.adapters.formats import read_adapter
from loraplex.adapters.merge_methods import MergeMethod, Mixing
from loraplex.adapters.merge_plan import MergeBase
from loraplex.adapters.model_folder import ModelFolder
from loraplex.adapters.speed_command import SpeedJob, measure_speed
from tests.parity.merge_models import make_adapter, make_base, merge_adapter


def test_merging_into_what_does_not_fit(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama")
    other = make_base(tmp_path / "other", "gpt2")
    adapter = make_adapter(base, tmp_path / "adapter", ["q_proj"])
    with pytest.raises(PreconditionError, match="no linear module"):
        merge_adapter(other, adapter, tmp_path / "merged")
    with pytest.raises(PreconditionError, match="not the adapter's base model"):
        merge_adapter(other, bind(read_adapter(adapter), ModelFolder.open(base).base_model()), tmp_path / "merged")
    wide = ModuleWeights(torch.zeros(2, 65), torch.zeros(64, 2), 1.0)
    with pytest.raises(PreconditionError, match="64 inputs and 64 outputs"):
        merge_adapter(base, BoundAdapter("d", {"model.layers.0.self_attn.q_proj": wide}), tmp_path / "merged")
    with pytest.raises(AdapterFormatError):
        merge_adapter(base, tmp_path, tmp_path / "merged")


@pytest.mark.parametrize("where", ["adapter", "base", "overflow"])
def test_nan_is_refused_and_leaves_nothing(tmp_path: Path, where: str) -> None:
    base = make_base(tmp_path / "base", "llama")
    adapter = make_adapter(base, tmp_path / "adapter", ["q_proj"])
    bound = bind(read_adapter(adapter), ModelFolder.open(base).base_model())
    dtype, name = None, "model.layers.1.self_attn.q_proj"
    if where == "adapter":
        bound.modules[name].b[0, 0] = float("nan")
    else:
        weights = load_file(base / "model.safetensors")
        changed = f"{name}.weight" if where == "base" else "model.norm.weight"
        weights[changed].view(-1)[0] = float("nan") if where == "base" else 1e30
        save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
        dtype = None if where == "base" else torch.float16
    before = sorted(tmp_path.iterdir())
    with pytest.raises(PreconditionError, match="NaN or infinite"):
        merge_adapter(base, bound, tmp_path / "merged", dtype=dtype)
    assert sorted(tmp_path.iterdir()) == before


def test_outputs_that_exist_are_not_touched(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama")
    adapter = make_adapter(base, tmp_path / "adapter", ["q_proj"])
    (tmp_path / "merged").mkdir()
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("merged", "dangling"):
        with pytest.raises(AlreadyExistsError):
            merge_adapter(base, adapter, tmp_path / name)

    def interfere(phase: str, done: int, total: int) -> None:
        (tmp_path / "late").mkdir(exist_ok=True)
        (tmp_path / "late" / "mine").touch()

    with pytest.raises(AlreadyExistsError):
        merge_adapter(base, adapter, tmp_path / "late", progress=interfere)
    assert [path.name for path in (tmp_path / "late").iterdir()] == ["mine"]
    assert not list(tmp_path.glob(".*.partial"))


def test_a_full_disk_and_an_interruption_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_base(tmp_path / "base", "llama")
    adapter = make_adapter(base, tmp_path / "adapter", ["q_proj"])
    before = sorted(tmp_path.iterdir())

    def stop(phase: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_adapter(base, adapter, tmp_path / "merged", progress=stop)
    assert sorted(tmp_path.iterdir()) == before
    with monkeypatch.context() as patch:
        patch.setattr(merge, "free_bytes", lambda folder: 1000)
        with pytest.raises(ResourceExhaustedError, match="needs"):
            merge_adapter(base, adapter, tmp_path / "merged")
    assert sorted(tmp_path.iterdir()) == before

    def fill(phase: str, done: int, total: int) -> None:
        # The config goes to a device that is always full.
        folder = next(tmp_path.glob(".*.partial"))
        (folder / "config.json").unlink(missing_ok=True)
        (folder / "config.json").symlink_to("/dev/full")

    with pytest.raises(ResourceExhaustedError, match="disk is full"):
        merge_adapter(base, adapter, tmp_path / "merged", progress=fill)
    assert sorted(tmp_path.iterdir()) == before


def test_too_far_from_the_unmerged_model_fails_and_leaves_nothing(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama")
    adapter = make_adapter(base, tmp_path / "adapter", ["q_proj"])
    before = sorted(tmp_path.iterdir())
    with pytest.raises(PreconditionError, match=r"too far .* mean KL .* at most 1e-09"):
        merge_adapter(base, adapter, tmp_path / "merged", dtype=torch.bfloat16, max_mean_kl=1e-9)
    assert sorted(tmp_path.iterdir()) == before
    result = merge_adapter(base, adapter, tmp_path / "merged", dtype=torch.bfloat16)
    assert 1e-9 < result.comparison.mean_kl < 1e-2


def test_the_check_sees_a_wrong_weight(tmp_path: Path) -> None:
    """What is compared is what was written, not what was meant."""
    base = make_base(tmp_path / "base", "llama")
    adapter = make_adapter(base, tmp_path / "adapter", ["q_proj"])

    def damage(phase: str, done: int, total: int) -> None:
        if phase == "checking" and done == 1:
            (folder,) = tmp_path.glob(".*.partial")
            file = folder / "model.safetensors"
            weights = load_file(file)
            weights["model.layers.0.mlp.down_proj.weight"] += 1
            save_file(weights, file, metadata={"format": "pt"})

    with pytest.raises(PreconditionError, match="too far"):
        merge_adapter(base, adapter, tmp_path / "merged", progress=damage)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("prompts", "match"),
    [(("text",), "no tokenizer"), (("text",) * 257, "at most 256")],
    ids=["no tokenizer", "too many"],
)
def test_prompts_are_refused_before_anything_is_written(tmp_path: Path, prompts: tuple[str, ...], match: str) -> None:
    base = make_base(tmp_path / "base", "llama")
    adapter = make_adapter(base, tmp_path / "adapter", ["q_proj"])
    told: list[str] = []
    with pytest.raises(InvalidRequestError, match=match):
        merge_adapter(base, adapter, tmp_path / "m", prompts=prompts, progress=lambda phase, *_: told.append(phase))
    assert told == []


SPEED_PROGRAM = """
import json, pathlib, sys
job = json.load(sys.stdin)
assert pathlib.Path(job["merged"], "config.json").is_file() and job["scale"] == 0.5 and len(job["prompts"]) == 8
if sys.argv[1] == "fails":
    print(json.dumps({"error": "no engine"}))
elif sys.argv[1] == "measures":
    print(json.dumps({"done": 1, "total": 1}))
    side = {"tokens_per_second": 5.0, "first_token_ms": 3.0, "inter_token_ms_p50": 2.0}
    print(json.dumps({"speed": [{"model": "unmerged", **side}, {"model": "merged", **side}]}))
"""


@pytest.mark.parametrize(("does", "match"), [("fails", "no engine"), ("vanishes", "without a word")])
def test_speed_that_cannot_be_measured_fails_the_merge(tmp_path: Path, does: str, match: str) -> None:
    base = make_base(tmp_path / "base", "llama")
    adapter = make_adapter(base, tmp_path / "adapter", ["q_proj"])
    before = sorted(tmp_path.iterdir())

    def command(does: str) -> tuple[str, ...]:
        return (sys.executable, "-c", SPEED_PROGRAM, does)

    with pytest.raises(PreconditionError, match=match):
        merge_adapter(base, adapter, tmp_path / "merged", scale=0.5, speed_command=command(does))
    assert sorted(tmp_path.iterdir()) == before
    result = merge_adapter(base, adapter, tmp_path / "merged", scale=0.5, speed_command=command("measures"))
    assert [side.model for side in result.speed] == ["unmerged", "merged"]
    bound = bind(read_adapter(adapter), ModelFolder.open(base).base_model())
    with pytest.raises(InvalidRequestError, match="measure_speed"):
        merge_adapter(base, bound, tmp_path / "other", speed_command=command("measures"))


def test_a_program_that_dies_before_it_reads_tells_its_status(tmp_path: Path) -> None:
    job = SpeedJob(tmp_path, tmp_path, 1.0, tmp_path, ["more than a pipe holds " * 10_000])
    with pytest.raises(PreconditionError, match="without a word, with status 3"):
        measure_speed((sys.executable, "-c", "raise SystemExit(3)"), job, lambda done, total: None)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"base": MergeBase.DEQUANTIZED}, "quantization"),
        ({"base": MergeBase.DEQUANTIZED, "quantization": "int3"}, "quantization"),
        ({"quantization": "nf4"}, "quantization"),
        ({"scale": float("nan")}, "scale"),
        ({"dtype": torch.int8}, "dtype"),
        ({"quantize": "int8"}, "quantize"),
        ({"max_shard_bytes": 0}, "max_shard_bytes"),
        ({"max_mean_kl": -1.0}, "max_mean_kl"),
        ({"mixing": Mixing(MergeMethod.TIES)}, "method"),
        ({"mixing": Mixing(density=0.5)}, "density"),
        ({"mixing": Mixing(seed=1)}, "seed"),
        ({"output": Path("absent/folder/merged")}, "output"),
        ({"output": Path(f".mine.{'0' * 32}.partial")}, "unfinished"),
    ],
)
def test_arguments_that_make_no_sense(tmp_path: Path, arguments: dict[str, Any], field: str) -> None:
    output = tmp_path / arguments.pop("output", "merged")
    with pytest.raises(InvalidRequestError, match=field):
        merge_adapter(tmp_path, tmp_path, output, **arguments)


def test_models_that_cannot_be_read(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama")
    adapter = make_adapter(base, tmp_path / "adapter", ["q_proj"])

    def refused(match: str) -> None:
        with pytest.raises(PreconditionError, match=match):
            merge_adapter(base, adapter, tmp_path / "merged")

    config = (base / "config.json").read_text()
    (base / "config.json").write_text(json.dumps(json.loads(config) | {"quantization_config": {"load_in_4bit": True}}))
    refused("already quantized")
    (base / "config.json").write_text(config)
    os.truncate(base / "model.safetensors", 1000)
    refused("damaged")
    (base / "model.safetensors").unlink()
    refused("only safetensors can be merged")
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../b.safetensors"}}))
    refused("does not name the files")
    shutil.rmtree(base)
    refused("cannot be read")
