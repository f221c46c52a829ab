from __future__ import annotations

import json
from pathlib import Path

from tests.unit.command import Run, ok


def test_the_plan_of_a_common_model_has_the_seeds_figures_beside_it(run: Run, tmp_path: Path) -> None:
    chart = tmp_path / "plan.png"
    table = ok(run("plan", "llama-2-7b", "--batch-size", 1, "--length", 64, "--chart", chart))
    for text in ("6,738,415,616 parameters", "60 GB", "24 GB", "9 GB", "built-in table"):
        assert text in table
    assert chart.read_bytes().startswith(b"\x89PNG")


def test_the_plan_as_json_says_what_it_assumed(run: Run) -> None:
    options = ("--rank", 4, "--target", "c_attn", "--batch-size", 1, "--length", 32, "--sequences", 2, "--gpu")
    plan = json.loads(ok(run("plan", "gpt2", *options, "--json")))
    assert plan["parameters"] == 124_439_808
    assert plan["trained_parameters"] == 12 * 4 * (768 + 3 * 768)
    assert plan["assumed"]["target_modules"] == ["c_attn"]
    rows = {(row["purpose"], row["method"]): row for row in plan["bytes"]}
    methods = {"train": ("full", "lora", "qlora"), "serve": ("none", "nf4", "int8")}
    assert set(rows) == {(purpose, method) for purpose in methods for method in methods[purpose]}
    assert rows["train", "full"]["optimizer"] == 2 * rows["train", "full"]["weights"] == 2 * 2 * 124_439_808
    assert all(row["seed_gb"] is None for row in rows.values())


def test_a_target_that_misses_is_said(run: Run) -> None:
    result = run("plan", "gpt2", "--target", "q_proj", "--length", 8)
    assert (result.exit_code, "q_proj" in result.stderr) == (1, True)
