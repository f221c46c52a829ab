"""`make gpu-check` and `make gpu-bench` at tiny sizes: Triton interprets the kernels, replays run the step again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from loraplex.bench.gpu.checks import Check, CheckSize, run_checks, sizes
from loraplex.bench.gpu.step_model import TINY
from loraplex.bench.gpu.targets import TARGETS
from loraplex.server.lora.ops.triton import TritonLoraOps
from tests.triton_interpreter import DEVICE

ROOT = Path(__file__).parents[2]
# What the machine that is lent does not have, and the scripts must do without.
ABSENT = ("bitsandbytes", "rich", "sqlalchemy", "grpc", "numba_cuda")
FEW = replace(sizes(short=True, shapes=TINY[:1]), rows=(3,), ranks=(3,), context=20)


def checks(size: CheckSize) -> list[Check]:
    told: list[Check] = []
    assert run_checks(DEVICE, size, told.append) == all(check.passed for check in told)
    return told


def test_every_check_passes_on_kernels_that_are_right() -> None:
    told = checks(replace(FEW, shapes=TINY[1:]))
    assert not [check for check in told if not check.passed]
    for what in ("LoRA kernels", "attention", "NF4 product", "transformers", "replayed steps", "rows alone"):
        assert any(what in check.what for check in told), what


def test_a_wrong_kernel_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    own = TritonLoraOps.add

    def add(self: TritonLoraOps, y: torch.Tensor, x: torch.Tensor, site: int, prepared: object) -> None:
        own(self, y, x, site, prepared)
        if site == 2:
            y[0] += 0.1

    monkeypatch.setattr(TritonLoraOps, "add", add)
    assert any("LoRA kernels" in check.what for check in checks(FEW) if not check.passed)


def test_a_step_that_is_not_replayed_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TritonLoraOps, "refill", lambda *arguments: False)
    wrong = [check for check in checks(FEW) if not check.passed]
    assert any("not replayed" in check.what for check in wrong)


def test_not_a_number_never_passes() -> None:
    assert not Check("", float("nan"), 1.0).passed


@pytest.mark.slow
@pytest.mark.parametrize("what", ["check", "bench"])
def test_the_scripts_run_without_what_a_lent_machine_lacks(what: str, tmp_path: Path) -> None:
    code = f"import runpy, sys; sys.modules.update(dict.fromkeys({ABSENT!r})); sys.argv = ['gpu', *sys.argv[1:]]; "
    code += "runpy.run_module('loraplex.bench.gpu', run_name='__main__')"
    path = os.pathsep.join(str(ROOT / folder) for folder in ("server", "client", "protos", "adapters", "bench"))
    done = subprocess.run(
        [sys.executable, "-c", code, what, "--device", "cpu", "--json", str(tmp_path / "gpu.json")],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    if what == "bench":
        document = json.loads((tmp_path / "gpu.json").read_text())
        assert {target.key for target in TARGETS} <= document.keys()
        assert document["replayed_steps"] == 5 * 4, "each case in four turns"
        assert "TritonFourBitLinear" in document["nf4_product"]
        assert (tmp_path / "gpu.png").is_file()
