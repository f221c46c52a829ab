"""Binding: every tensor and every target finds its place in the base, or all that do not are reported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from loraplex.adapters.binding import BindError, bind, bind_report
from loraplex.adapters.errors import PreconditionError
from loraplex.adapters.formats import read_adapter
from tests.adapter_factory import tensors, tiny_base, write_adapter


def test_bound_weights_are_the_sources(tmp_path: Path) -> None:
    base = tiny_base()
    weights = tensors(base, ("q_proj", "lm_head"))
    folder = write_adapter(
        tmp_path, weights=weights, target_modules=["q_proj", "lm_head"], use_rslora=True, template="{{ x }}"
    )
    adapter = read_adapter(folder)
    bound = bind(adapter, base)
    assert bound.digest == adapter.digest
    assert bound.chat_template == "{{ x }}"
    assert set(bound.modules) == {"lm_head", *(f"model.layers.{i}.self_attn.q_proj" for i in range(2))}
    head = bound.modules["lm_head"]
    assert torch.equal(head.a, weights["base_model.model.lm_head.lora_A.weight"])
    assert head.b.shape == (32, 4)
    assert head.rank == 4
    assert head.scaling == 4.0
    assert bound.nbytes == sum(tensor.nbytes for tensor in weights.values())


def test_the_report_names_module_rank_and_scaling(tmp_path: Path) -> None:
    report = bind_report(read_adapter(write_adapter(tmp_path, alpha_pattern={"v_proj": 2})), tiny_base())
    assert report.problems == ()
    assert report.base_fingerprint == "tiny"
    entries = {entry.subject: entry for entry in report.entries}
    entry = entries["base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"]
    assert (entry.module, entry.rank, entry.scaling) == ("model.layers.1.self_attn.v_proj", 4, 0.5)
    assert len(entries) == len(tensors(tiny_base()))


def test_wrong_base_shapes_and_unknown_modules_are_all_reported(tmp_path: Path) -> None:
    weights = tensors(tiny_base())
    q0 = "base_model.model.model.layers.0.self_attn.q_proj"
    weights[f"{q0}.lora_A.weight"] = torch.zeros(4, 99)
    weights[f"{q0}.lora_B.weight"] = torch.zeros(98, 4)
    for side in "AB":
        weights[f"base_model.model.model.layers.7.self_attn.q_proj.lora_{side}.weight"] = torch.zeros(4, 4)
    adapter = read_adapter(write_adapter(tmp_path, weights=weights, target_modules=["q_proj", "v_proj", "gate_proj"]))
    with pytest.raises(BindError) as caught:
        bind(adapter, tiny_base())
    error = caught.value
    assert isinstance(error, PreconditionError)
    problems = {entry.subject: entry.problem for entry in error.report.problems}
    assert len(problems) == len(error.violations) == 5
    assert "has 99 inputs, the base's module has 8" in problems[f"{q0}.lora_A.weight"]
    assert "has 98 outputs, the base's module has 8" in problems[f"{q0}.lora_B.weight"]
    unknown = problems["base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight"]
    assert "no linear module model.layers.7.self_attn.q_proj" in unknown
    assert "model.layers.0.self_attn.q_proj" in unknown
    assert "named in target_modules, but no tensor belongs to it" in problems["gate_proj"]
    assert "some/base" in str(error)
    assert "and 2 more" in str(error)


def test_another_name_of_the_base_is_no_reason_to_refuse(tmp_path: Path) -> None:
    adapter = read_adapter(write_adapter(tmp_path, base_model_name_or_path="quite/another"))
    assert bind(adapter, tiny_base("other fingerprint")).modules
