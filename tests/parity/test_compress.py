"""Compressed adapters: the best of their rank, by torch's SVD of the whole product, and as PEFT loads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from loraplex.adapters.compress import Budget, Compressed, Factors, compress_module, total_error
from loraplex.adapters.compressed_folder import CompressReport, compress_adapters
from loraplex.adapters.errors import AdapterFormatError, AlreadyExistsError, InvalidRequestError, PreconditionError
from loraplex.adapters.folder import WEIGHTS_FILE
from tests.integration.serving import fitting_adapter
from tests.parity.merge_models import LLAMA_TARGETS, load, logits, make_adapter, make_base

WEIGHTS = {"first": 0.5, "second": -1.5}


def product(factors: list[Factors]) -> torch.Tensor:
    return sum((each.factor * each.b.double() @ each.a.double() for each in factors), torch.zeros(()).double())


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    outputs=st.integers(1, 20),
    inputs=st.integers(1, 20),
    ranks=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    rank=st.integers(1, 8),
)
def test_nothing_of_that_rank_is_nearer(seed: int, outputs: int, inputs: int, ranks: list[int], rank: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    factors = [Factors(draw(r, inputs), draw(outputs, r), 1.5 - index) for index, r in enumerate(ranks)]
    whole = product(factors)
    singular = torch.linalg.svdvals(whole)
    found = compress_module(factors, Budget(rank=rank), torch.float32)
    assert found.rank <= min(rank, sum(ranks))
    lost = float(torch.linalg.norm(singular[found.rank :]))
    scale = float(torch.linalg.norm(singular))
    actual = float(torch.linalg.norm(found.b.double() @ found.a.double() - whole))
    assert found.norm == pytest.approx(scale, rel=1e-9)
    assert actual == pytest.approx(lost, abs=1e-5 * scale)
    assert found.error == pytest.approx(actual, abs=1e-9 * scale + 1e-12)


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99, 1.0])
def test_energy_decides_the_rank(energy: float) -> None:
    generator = torch.Generator().manual_seed(1)
    factors = [Factors(torch.randn(8, 40, generator=generator), torch.randn(30, 8, generator=generator), 2.0)]
    squares = torch.linalg.svdvals(product(factors)).square()
    found = compress_module(factors, Budget(energy=energy), torch.float32)
    shares = torch.cumsum(squares, 0) / squares.sum()
    assert shares[found.rank - 1] >= energy - 1e-9
    assert found.rank == 1 or shares[found.rank - 2] < energy
    assert compress_module(factors, Budget(rank=2, energy=energy), torch.float32).rank == min(2, found.rank)


def test_rounding_and_nothing_at_all() -> None:
    generator = torch.Generator().manual_seed(1)
    factors = [Factors(torch.randn(4, 40, generator=generator), torch.randn(30, 4, generator=generator), 1.0)]
    exact, rounded = (compress_module(factors, Budget(rank=4), dtype) for dtype in (torch.float32, torch.bfloat16))
    assert exact.relative_error < 1e-6 < 1e-4 < rounded.relative_error < 1e-2
    zero = compress_module([Factors(torch.zeros(4, 5), torch.ones(6, 4), 1.0)], Budget(energy=0.9), torch.float32)
    assert (zero.rank, zero.relative_error, zero.norm) == (1, 0.0, 0.0)
    parts = [Compressed(torch.ones(1, 1), torch.ones(1, 1), 1, norm, error) for norm, error in ((3.0, 0.3), (4.0, 0.4))]
    assert total_error(parts) == pytest.approx(0.1)
    for budget in (Budget(), Budget(rank=0), Budget(energy=0.0), Budget(energy=1.1)):
        with pytest.raises(InvalidRequestError):
            budget.check()


def test_peft_loads_the_sum_of_two(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama", tied=False)
    first = make_adapter(base, tmp_path / "first", [*LLAMA_TARGETS, "lm_head", "embed_tokens"], use_rslora=True)
    second = make_adapter(base, tmp_path / "second", ["q_proj"], rank_pattern={"layers.0": 3})
    output = tmp_path / "sum"
    report = compress_adapters([(first, WEIGHTS["first"]), (second, WEIGHTS["second"])], output, Budget(energy=1.0))
    assert report.relative_error < 1e-6
    assert {module.source_rank for module in report.modules} == {8, 16}
    both: Any = PeftModel.from_pretrained(load(base), str(first), adapter_name="first")
    both.load_adapter(str(second), adapter_name="second")
    # Both at once; PEFT's own sum would give the result the first one's rsLoRA scaling.
    both.base_model.set_adapter(["first", "second"])
    for layer in both.modules():
        if isinstance(layer, LoraLayer):
            layer.scaling |= {name: layer.scaling[name] * w for name, w in WEIGHTS.items() if name in layer.scaling}
    one = PeftModel.from_pretrained(load(base), str(output)).eval()
    torch.testing.assert_close(logits(one), logits(both), atol=2e-5, rtol=0)
    assert sum(tensor.nbytes for tensor in load_file(output / "adapter_model.safetensors").values()) == report.bytes
    assert all(digest in (output / "README.md").read_text() for digest in report.digests)


def test_ranks_that_differ_are_told_as_patterns(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama")
    source = make_adapter(base, tmp_path / "source", LLAMA_TARGETS)
    report = compress_adapters([(source, 1.0)], tmp_path / "small", Budget(energy=0.8))
    ranks = {module.module: module.rank for module in report.modules}
    assert len(set(ranks.values())) > 1
    assert 0.1 < report.relative_error <= 0.2**0.5
    config = json.loads((tmp_path / "small" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == {name: rank for name, rank in ranks.items() if rank != report.rank}
    model: Any = PeftModel.from_pretrained(load(base), str(tmp_path / "small")).eval()
    before: Any = PeftModel.from_pretrained(load(base), str(source)).eval()
    for module in report.modules:
        new, old = (m.get_base_model().get_submodule(module.module) for m in (model, before))
        assert (new.r["default"], new.scaling["default"]) == (module.rank, 1.0)
        whole = old.get_delta_weight("default")
        lost = torch.linalg.norm(new.get_delta_weight("default") - whole) / torch.linalg.norm(whole)
        assert float(lost) == pytest.approx(module.relative_error, rel=1e-3)


def test_what_cannot_be_compressed_is_named(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama")
    plain = make_adapter(base, tmp_path / "plain", ["q_proj"])

    def refused(match: str, *folders: Path) -> None:
        with pytest.raises(AdapterFormatError, match=match):
            compress_adapters([(folder, 1.0) for folder in folders], tmp_path / "out", Budget(rank=1))
        assert not (tmp_path / "out").exists()

    refused("DoRA magnitude", make_adapter(base, tmp_path / "dora", ["q_proj"], use_dora=True))
    refused("bias on B", make_adapter(base, tmp_path / "bias", ["q_proj"], lora_bias=True))
    refused("trained whole", make_adapter(base, tmp_path / "norm", ["q_proj"], modules_to_save=["norm"]))
    alora = make_adapter(base, tmp_path / "alora", ["q_proj"], alora_invocation_tokens=[5, 6])
    refused("alora_invocation_tokens", alora, plain)
    compress_adapters([(alora, 1.0)], tmp_path / "small-alora", Budget(rank=1))
    config = json.loads((tmp_path / "small-alora" / "adapter_config.json").read_text())
    assert config["alora_invocation_tokens"] == [5, 6]
    other = fitting_adapter(tmp_path / "other")
    refused("does not fit the other adapters'", plain, other)
    with pytest.raises(AlreadyExistsError):
        compress_adapters([(plain, 1.0)], tmp_path / "plain", Budget(rank=1))
    with pytest.raises(InvalidRequestError, match="unfinished"):
        compress_adapters([(plain, 1.0)], tmp_path / f".mine.{'0' * 32}.partial", Budget(rank=1))
    with pytest.raises(InvalidRequestError, match="scale"):
        compress_adapters([(plain, float("nan"))], tmp_path / "out", Budget(rank=1))


@pytest.mark.parametrize(
    ("weight", "match"), [(1e11, "q_proj is too large for torch.float16"), (1e308, "q_proj is too large: choose")]
)
def test_what_is_not_finite_is_refused_and_leaves_nothing(tmp_path: Path, weight: float, match: str) -> None:
    source = make_adapter(make_base(tmp_path / "base", "llama"), tmp_path / "source", ["q_proj"])
    weights = load_file(source / WEIGHTS_FILE)
    key = next(key for key in weights if "lora_B" in key)
    weights[key] *= 1e3
    save_file(weights, source / WEIGHTS_FILE)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(PreconditionError, match=match):
        compress_adapters([(source, weight)], tmp_path / "out", Budget(rank=2), torch.float16)
    assert sorted(tmp_path.iterdir()) == before


def test_the_command_tells_what_is_lost(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from loraplex.cli.main import app

    source = fitting_adapter(tmp_path / "source")
    runner = CliRunner()
    arguments = ["adapter", "compress", str(source), "--rank", "2", "--output"]
    told = json.loads(runner.invoke(app, [*arguments, str(tmp_path / "a"), "--json"]).stdout)
    report = compress_adapters([(source, 1.0)], tmp_path / "b", Budget(rank=2))
    assert {**told, "output": ""} == {**json.loads(json.dumps(as_json(report))), "output": ""}
    shown = runner.invoke(app, [*arguments, str(tmp_path / "c")])
    assert f"{report.relative_error:.3%} of the whole update is lost" in shown.stdout
    assert runner.invoke(app, ["adapter", "compress", str(source), "--output", str(tmp_path / "d")]).exit_code == 2
    absent = ["adapter", "compress", str(tmp_path / "absent"), "--rank", "2"]
    assert runner.invoke(app, [*absent, "--output", str(tmp_path / "e" / "f")]).exit_code == 1
    assert not (tmp_path / "e").exists()


def as_json(report: CompressReport) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(report)
