from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from loraplex.adapters.compress import Budget, Factors, singular_values
from loraplex.adapters.compressed_folder import compress_adapters
from loraplex.adapters.training.spectrum import KEPT_ENERGY, effective_rank, read_spectrum
from tests.adapter_factory import config
from tests.unit.command import Run, ok

EXAMPLE = Path(__file__).parents[2] / "adapters" / "examples" / "sql"


@given(st.integers(1, 6), st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**16))
@settings(deadline=None)
def test_singular_values_are_those_of_the_whole_product(rank: int, inputs: int, outputs: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rank, inputs, generator=draw), torch.randn(outputs, rank, generator=draw)
    found = singular_values([Factors(a, b, 1.5)])
    whole = torch.linalg.svdvals(1.5 * b.double() @ a.double())
    assert len(found) == rank
    padded = torch.nn.functional.pad(whole, (0, max(0, rank - len(whole))))[:rank]
    torch.testing.assert_close(found, padded, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("singular", "effective"), [([1.0] * 5, 5.0), ([3.0, 0.0, 0.0], 1.0), ([0.0, 0.0], 0.0), ([2.0, 2.0, 0.0], 2.0)]
)
def test_the_effective_rank_counts_equal_values(singular: list[float], effective: float) -> None:
    assert effective_rank(torch.tensor(singular, dtype=torch.float64)) == pytest.approx(effective)


def write_known(folder: Path, values: dict[str, list[float]]) -> None:
    """An adapter whose updates have these singular values, times its scaling of 2."""
    folder.mkdir()
    tensors = {}
    for index, (module, singular) in enumerate(values.items()):
        draw = torch.Generator().manual_seed(index)
        left = torch.linalg.qr(torch.randn(8, len(singular), generator=draw)).Q
        right = torch.linalg.qr(torch.randn(8, len(singular), generator=draw)).Q
        prefix = f"base_model.model.{module}"
        tensors[f"{prefix}.lora_A.weight"] = right.t().contiguous()
        tensors[f"{prefix}.lora_B.weight"] = (left * torch.tensor(singular)).contiguous()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config()))


def test_wasted_rank_is_found_where_it_is(tmp_path: Path) -> None:
    q, v = "model.layers.10.self_attn.q_proj", "model.layers.2.self_attn.v_proj"
    write_known(tmp_path / "known", {q: [5.0, 0.1, 0.0, 0.0], v: [1.0, 1.0, 1.0, 1.0]})
    spectrum = read_spectrum(tmp_path / "known")
    assert [module.module for module in spectrum.modules] == [v, q]  # layer 2 before layer 10
    full, thin = spectrum.modules
    assert (full.role, full.needed, full.wasted) == ("v", 4, 0)
    assert full.effective == pytest.approx(4, abs=1e-4)
    assert thin.singular == pytest.approx((10.0, 0.2, 0.0, 0.0), abs=1e-5)
    assert (thin.needed, thin.wasted) == (1, 3)
    p1, p2 = 10 / 10.2, 0.2 / 10.2
    assert thin.effective == pytest.approx(math.exp(-p1 * math.log(p1) - p2 * math.log(p2)), abs=1e-4)
    assert (spectrum.rank, spectrum.needed, spectrum.size_left) == (8, 5, 5 / 8)


def test_what_is_needed_is_what_compress_leaves(tmp_path: Path) -> None:
    spectrum = read_spectrum(EXAMPLE)
    report = compress_adapters([(EXAMPLE, 1.0)], tmp_path / "small", Budget(energy=KEPT_ENERGY))
    assert {module.module: module.needed for module in spectrum.modules} == {m.module: m.rank for m in report.modules}
    assert spectrum.size_left == pytest.approx(report.bytes / report.source_bytes)


def test_the_command_writes_a_report_that_needs_nothing_else(run: Run, tmp_path: Path) -> None:
    shown = ok(run("analyze", "adapter", EXAMPLE, "--output", tmp_path / "out"))
    assert "q_proj" in shown
    assert "loraplex adapter compress" in shown
    page = (tmp_path / "out" / "adapter.html").read_text()
    assert "data:image/png;base64," in page
    assert "http" not in page.replace("data:image/png;base64,", "")
    assert "<script" not in page
    assert (tmp_path / "out" / "adapter.png").read_bytes().startswith(b"\x89PNG")
    document = json.loads((tmp_path / "out" / "adapter.json").read_text())
    assert len(document["modules"]) == 60


def test_the_command_compresses_on_demand(run: Run, tmp_path: Path) -> None:
    ok(run("analyze", "adapter", EXAMPLE, "--compress-to", tmp_path / "small"))
    before, after = read_spectrum(EXAMPLE), read_spectrum(tmp_path / "small")
    assert after.rank == before.needed


def test_a_folder_without_an_adapter_is_refused(run: Run, tmp_path: Path) -> None:
    result = run("analyze", "adapter", tmp_path)
    assert (result.exit_code, "adapter_config.json" in result.stderr) == (1, True)
