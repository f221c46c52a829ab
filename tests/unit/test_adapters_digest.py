"""The digest depends on the content and on nothing else."""

from __future__ import annotations

import hashlib
import json
import random
import struct

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex.adapters.digest import adapter_digest
from tests.adapter_factory import config, tensors, tiny_base

WEIGHTS = tensors(tiny_base())


def test_the_canonical_form_is_the_documented_one() -> None:
    def field(data: bytes) -> bytes:
        return struct.pack("<Q", len(data)) + data

    text = '{"peft_type":"LORA","rank_pattern":[["z",1],["a",2]],"target_modules":["a","b"]}'
    expected = field(b"loraplex-adapter-v1") + field(text.encode()) + struct.pack("<Q", 2)
    expected += field(b"k") + field(b"F32") + struct.pack("<QQQ", 2, 1, 2) + field(struct.pack("<ff", 1.0, 2.0))
    expected += field(b"l") + field(b"BF16") + struct.pack("<QQ", 1, 1) + field(b"\x80\x3f")
    expected += struct.pack("<Q", 1) + field("ü".encode())
    source = {
        "target_modules": ["b", "a"],
        "rank_pattern": {"z": 1, "a": 2},
        "revision": None,
        "peft_type": "LORA",
    }
    weights = {"l": torch.ones(1, dtype=torch.bfloat16), "k": torch.tensor([[1.0, 2.0]])}
    assert adapter_digest(source, weights, "ü") == "sha256:" + hashlib.sha256(expected).hexdigest()


@settings(deadline=None)
@given(st.randoms(use_true_random=False))
def test_order_does_not_matter(rng: random.Random) -> None:
    def shuffled(items: dict[str, object]) -> dict[str, object]:
        keys = list(items)
        rng.shuffle(keys)
        return {key: items[key] for key in keys}

    targets = ["q_proj", "v_proj", "o_proj"]
    plain = adapter_digest(config(target_modules=targets), WEIGHTS)
    other = shuffled(config(target_modules=rng.sample(targets, 3)))
    assert adapter_digest(json.loads(json.dumps(other)), shuffled(WEIGHTS)) == plain  # type: ignore[arg-type]


@settings(deadline=None)
@given(st.sampled_from(sorted(WEIGHTS)), st.integers(0, 10**6), st.integers(0, 31))
def test_any_bit_of_any_tensor_matters(name: str, position: int, bit: int) -> None:
    changed = {key: tensor.clone() for key, tensor in WEIGHTS.items()}
    words = changed[name].view(torch.int32).reshape(-1)
    words[position % words.numel()] ^= torch.tensor(1 << bit, dtype=torch.int64).to(torch.int32)
    assert adapter_digest(config(), changed) != adapter_digest(config(), WEIGHTS)


def test_names_shapes_dtypes_config_and_template_matter() -> None:
    name = next(iter(WEIGHTS))
    rest = {key: tensor for key, tensor in WEIGHTS.items() if key != name}
    variants = [
        adapter_digest(config(), WEIGHTS),
        adapter_digest(config(lora_alpha=9), WEIGHTS),
        adapter_digest(config(rank_pattern={"a": 4, "b": 4}), WEIGHTS),
        adapter_digest(config(rank_pattern={"b": 4, "a": 4}), WEIGHTS),
        adapter_digest(config(), WEIGHTS, ""),
        adapter_digest(config(), WEIGHTS, "template"),
        adapter_digest(config(), rest),
        adapter_digest(config(), rest | {name + "x": WEIGHTS[name]}),
        adapter_digest(config(), rest | {name: WEIGHTS[name].reshape(-1)}),
        adapter_digest(config(), rest | {name: WEIGHTS[name].bfloat16()}),
        adapter_digest(config(), rest | {name: WEIGHTS[name].half()}),
    ]
    assert len(set(variants)) == len(variants)
