"""Divided products give the whole product, and every device has whole heads."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from loraplex.server.models.config import DecoderConfig
from loraplex.server.models.layout import Layout, ModuleNames
from loraplex.server.models.sharding import shard_site

CONFIG = DecoderConfig(
    architecture="LlamaForCausalLM",
    vocab_size=24,
    hidden_size=16,
    intermediate_size=20,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    max_positions=32,
    norm="rms",
    norm_eps=1e-5,
    activation="silu",
    attention_scales=(1.0,),
    windows=(None,),
)
SITES = {linear.site.name.rpartition(".")[2]: linear.site for linear in Layout(CONFIG, ModuleNames()).linears}


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("kind", ["qkv", "o", "gate_up", "down", "lm_head"])
def test_the_parts_make_the_product_and_its_lora(kind: str, parts: int) -> None:
    site = SITES[kind]
    torch.manual_seed(0)
    weight = torch.randn(site.out_features, site.in_features, dtype=torch.float64)
    a, b = torch.randn(3, site.in_features, dtype=torch.float64), torch.randn(site.out_features, 3, dtype=torch.float64)
    x = torch.randn(2, site.in_features, dtype=torch.float64)
    y = torch.zeros(2, site.out_features, dtype=torch.float64)
    held = torch.zeros(site.out_features)
    shards = [shard_site(site, CONFIG, index, parts) for index in range(parts)]
    for shard in shards:
        columns = slice(*shard.inputs)
        for start, end in shard.outputs.values():
            rows = slice(start, end)
            product = x[:, columns] @ weight[rows, columns].T + (x[:, columns] @ a[:, columns].T) @ b[rows].T
            if shard.inputs == (0, site.in_features):
                y[:, rows] = product  # several devices may hold the same KV heads
            else:
                y[:, rows] += product
            held[rows] += 1
    assert torch.allclose(y, x @ weight.T + (x @ a.T) @ b.T)
    assert held.min() >= 1


def test_devices_share_kv_heads_where_there_are_too_few() -> None:
    shards = [shard_site(SITES["qkv"], CONFIG, index, 4) for index in range(4)]
    queries, keys, values = zip(*(shard.outputs.values() for shard in shards), strict=True)
    assert queries == ((0, 6), (6, 12), (12, 18), (18, 24))
    assert keys == ((24, 30), (24, 30), (30, 36), (30, 36))
    assert values == ((36, 42), (36, 42), (42, 48), (42, 48))


@pytest.mark.parametrize(("kind", "parts"), [("qkv", 3), ("o", 3), ("gate_up", 3), ("lm_head", 5), ("down", 8)])
def test_what_does_not_divide_is_refused(kind: str, parts: int) -> None:
    with pytest.raises(ValueError, match="do not divide"):
        shard_site(SITES[kind], CONFIG, 0, parts)


@pytest.mark.parametrize(
    ("kind", "names"),
    [("qkv", ModuleNames(qkv=("attention.qkv",))), ("gate_up", ModuleNames(gate_up=("mlp.both",)))],
)
def test_several_projections_in_one_module_are_refused(kind: str, names: ModuleNames) -> None:
    """As in Phi-3: the first half of gate and up side by side is all of the gate, and nothing of up."""
    linears = Layout(CONFIG, names).linears
    (fused,) = (linear.site for linear in linears if linear.name.endswith(kind))
    with pytest.raises(ValueError, match="one module"):
        shard_site(fused, CONFIG, 0, 2)


def test_a_plain_mlp_is_one_module_and_divides() -> None:
    config = replace(CONFIG, gated_mlp=False)
    linears = Layout(config, ModuleNames(gate_up=("mlp.fc",))).linears
    (plain,) = (linear.site for linear in linears if linear.name.endswith("gate_up"))
    shards = [shard_site(plain, config, index, 2) for index in range(2)]
    assert [[*shard.outputs.values()] for shard in shards] == [[(0, 10)], [(10, 20)]]
