"""`loraplex merge`: what it asks of a scripted server, and what it writes by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loraplex.v1 import export_pb2
from tests.unit.command import Run, ok
from tests.unit.fake_server import FakeServer


def test_merge_on_a_server(run: Run, server: FakeServer) -> None:
    arguments = ["--adapter", "a", "--output", "out", "--base", "dequantized", "--scale", "0.5"]
    result = run("merge", *arguments, "--server", server.target)
    assert ok(result) == "/exports/m\n"
    assert "mean KL 0.001 nats" in result.stderr
    assert "of unmerged" in result.stderr
    request = server.seen["MergeAdapter"][0].request
    assert (request.adapter, request.output, request.scale) == ("a", "out", 0.5)
    assert request.base == export_pb2.MERGE_BASE_DEQUANTIZED
    assert not request.HasField("density")


def test_merge_several_on_a_server(run: Run, server: FakeServer, tmp_path: Path) -> None:
    (tmp_path / "prompts").write_text("first\n\nsecond\n")
    adapters = ["--adapter", "a=0.5", "--adapter", "b", "--method", "dare-ties", "--density", "0.25", "--seed", "7"]
    more = ["--quantize", "nf4", "--max-shard-size", "1GB", "--prompts", tmp_path / "prompts", "--max-mean-kl", "0.5"]
    ok(run("merge", *adapters, *more, "--speed", "--output", "out", "--server", server.target))
    request = server.seen["MergeAdapter"][0].request
    assert [(each.adapter, each.weight) for each in request.adapters] == [("a", 0.5), ("b", 1.0)]
    assert (request.adapter, request.HasField("scale")) == ("", False)
    assert (request.method, request.density, request.seed) == (export_pb2.MERGE_METHOD_DARE_TIES, 0.25, 7)
    assert (request.quantize, request.max_shard_bytes, request.max_mean_kl) == ("nf4", 10**9, 0.5)
    assert (list(request.prompts), request.measure_speed) == (["first", "second"], True)


def write_base(folder: Path) -> Path:
    """Write a Llama of one layer with zeros for its q_proj."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {"hidden_size": 4, "intermediate_size": 8, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=16, num_hidden_layers=1, tie_word_embeddings=True, **sizes))
    layer: Any = model.model.layers[0]
    layer.self_attn.q_proj.weight.data.zero_()
    model.save_pretrained(folder)
    return folder


def write_ones(folder: Path) -> Path:
    """Write an adapter of ones with a scaling of 2 for that q_proj."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    lora = {f"{prefix}.lora_A.weight": torch.ones(2, 4), f"{prefix}.lora_B.weight": torch.ones(4, 2)}
    save_file(lora, folder / "adapter_model.safetensors")
    return folder


def test_merge_here(run: Run, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    base, adapter, output = write_base(tmp_path / "base"), write_ones(tmp_path / "a=b"), tmp_path / "new" / "merged"
    arguments = ("merge", "--model", base, "--adapter", f"{adapter}=0.5", "--output", output)
    result = run(*arguments)
    assert ok(result) == f"{output}\n"
    assert "same best token at 100.00%" in result.stderr
    module = "model.layers.0.self_attn.q_proj"
    merged = load_file(output / "model.safetensors")[f"{module}.weight"]
    assert torch.equal(merged, torch.full((4, 4), 2.0))  # weight 0.5, alpha / r = 2, and two ranks of ones
    again = run(*arguments)
    assert (again.exit_code, "exists" in again.stderr) == (1, True)


def test_merge_several_here(run: Run, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    base, adapter, other = write_base(tmp_path / "base"), write_ones(tmp_path / "one"), write_ones(tmp_path / "two")
    (tmp_path / "prompts").write_text("first\n\nsecond\n")
    arguments = ("merge", "--model", base, "--adapter", f"{adapter}=0.5", "--adapter", f"{other}=-0.25")
    told = json.loads(ok(run(*arguments, "--output", tmp_path / "m", "--json")))
    assert told["comparison"]["top1_agreement"] == 1.0
    assert len(told["adapter_digests"]) == 2
    merged = load_file(tmp_path / "m" / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    assert torch.equal(merged, torch.ones(4, 4))
    refused = run(*arguments, "--output", tmp_path / "made" / "n", "--method", "ties", "--density", "2")
    assert (refused.exit_code, "density" in refused.stderr) == (1, True)
    # A model without a tokenizer cannot be compared on texts.
    refused = run(*arguments, "--output", tmp_path / "n", "--prompts", tmp_path / "prompts")
    assert (refused.exit_code, "prompts" in refused.stderr) == (1, True)
    too_far = run("merge", "--model", base, "--adapter", adapter, "--output", tmp_path / "n", "--max-mean-kl", "-1")
    assert (too_far.exit_code, "max_mean_kl" in too_far.stderr) == (1, True)
    assert not (tmp_path / "n").exists()
    assert not (tmp_path / "made").exists()
