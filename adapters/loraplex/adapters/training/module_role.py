"""What a linear module does in its block, told from its place and its shape: q, k, v, o, gate, up, down or fused ones.

Architectures name the same thing differently (q_proj, query, q_lin; c_fc, fc1, dense_h_to_4h). What is not known by
name is told by what its path says (attention or not) and whether it widens or narrows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

from loraplex.adapters.training.architecture import LinearModule

Role = Literal["q", "k", "v", "o", "qkv", "attention", "gate", "up", "gate_up", "down", "router", "outside"]

ATTENTION_ROLES: frozenset[Role] = frozenset({"q", "k", "v", "o", "qkv", "attention"})
FEED_FORWARD_ROLES: frozenset[Role] = frozenset({"gate", "up", "gate_up", "down"})

_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_NUMBER = re.compile(r"\d+")
_ATTENTION_NAMES: Mapping[Role, re.Pattern[str]] = {
    "qkv": re.compile(r"c_attn|qkv(_proj)?|w_?qkv|query_key_value|in_proj", re.IGNORECASE),
    "q": re.compile(r"(to_|w)?q(_proj|_lin|uery)?|query(_proj)?|q_[ab]_proj", re.IGNORECASE),
    "k": re.compile(r"(to_|w)?k(_proj|_lin|ey)?|key(_proj)?", re.IGNORECASE),
    "v": re.compile(r"(to_|w)?v(_proj|_lin|alue)?|value(_proj)?", re.IGNORECASE),
    "o": re.compile(r"w?o(ut)?(_proj|_lin)?|c_proj|dense|to_out", re.IGNORECASE),
}
_GATE = re.compile(r"gate_proj|w1|wg", re.IGNORECASE)
_FUSED_GATE = re.compile(r"gate_up(_proj)?|up_gate(_proj)?", re.IGNORECASE)
_ROUTER = re.compile(r"gate|router|shared_expert_gate", re.IGNORECASE)


def role_of(module: LinearModule) -> Role:
    """Say what `module` does; "outside" is what lies in no repeated block: poolers, classifiers, output layers."""
    *path, leaf = module.name.split(".")
    if not any(_NUMBER.fullmatch(part) for part in path):
        return "outside"
    if any(_ATTENTION.search(part) for part in path):
        names = _ATTENTION_NAMES.items()
        return next((role for role, pattern in names if pattern.fullmatch(leaf)), "attention")
    if _ROUTER.fullmatch(leaf):
        return "router"
    if _FUSED_GATE.fullmatch(leaf):
        return "gate_up"
    if _GATE.fullmatch(leaf):
        return "gate"
    return "down" if module.in_features > module.out_features else "up"


def kind_of(name: str) -> str:
    """Return a module's name with N for every number: one kind of module, whatever its layer."""
    return ".".join("N" if part.isdigit() else part for part in name.split("."))
