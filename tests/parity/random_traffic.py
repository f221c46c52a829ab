"""Random traffic: who asks for what and when, which names change, and how little memory there is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from tests.parity.peft_adapters import ALL_PROJECTIONS, RandomAdapter
from tests.parity.peft_formats import PeftFormat
from tests.unit.fakes import VOCAB

# Prompts are beginnings of one text with one token more, so that most share blocks of a prefix.
STORY = tuple(torch.randint(VOCAB, (28,), generator=torch.Generator().manual_seed(1)).tolist())
INVOCATION = STORY[10:12]
# More contents than names, so that a name can get other weights while its requests run.
CONTENTS: tuple[RandomAdapter | PeftFormat, ...] = (
    RandomAdapter("c0", 2, 0.5),
    RandomAdapter("c1", 4, 0.5, (*ALL_PROJECTIONS, "lm_head")),
    RandomAdapter("c2", 8, 0.5, ("q_proj", "v_proj")),
    RandomAdapter("c3", 16, 0.5),
    RandomAdapter("c4", 3, 0.5, ("up_proj", "down_proj", "lm_head")),
    RandomAdapter("c5", 8, 0.5),
    PeftFormat("dora", {"target_modules": "all-linear", "use_dora": True}),
    PeftFormat("activated", {"target_modules": "all-linear", "alora_invocation_tokens": list(INVOCATION)}),
    PeftFormat(
        "tokens", {"target_modules": ["q_proj"], "lora_bias": True, "trainable_token_indices": list(STORY[::2])}
    ),
    PeftFormat("whole", {"target_modules": ["v_proj"], "modules_to_save": ["norm", "embed_tokens", "lm_head"]}),
    PeftFormat(
        "embedding", {"target_modules": ["embed_tokens", "lm_head", "o_proj"]}, {"save_embedding_layers": False}
    ),
)
NAMES = ("n0", "n1", "n2", "n3")
MAX_TOKENS = 20
BLOCK_SIZE = 4
LONGEST = len(STORY) + 1 + MAX_TOKENS


@dataclass(frozen=True)
class Add:
    """A request; `name` None is the base."""

    length: int
    tail: int
    max_tokens: int
    name: str | None
    scale: float
    choices: int


@dataclass(frozen=True)
class Together:
    """Requests that arrive between two steps."""

    adds: tuple[Add, ...]


@dataclass(frozen=True)
class Abort:
    """A caller goes away; `request` counts from the latest."""

    request: int


@dataclass(frozen=True)
class Register:
    """`name` gets the content, whether or not it had another."""

    name: str
    content: int


@dataclass(frozen=True)
class Unregister:
    """`name` goes, whatever runs on it."""

    name: str


@dataclass(frozen=True)
class Steps:
    """The engine works for a while."""

    number: int


Action = Together | Abort | Register | Unregister | Steps
ADDS = st.builds(
    Add,
    length=st.sampled_from((0, 3, 9, 17, len(STORY))),
    tail=st.integers(0, 1),
    max_tokens=st.sampled_from((1, 7, 13, MAX_TOKENS)),
    name=st.sampled_from((*NAMES, None)),
    scale=st.sampled_from((1.0, 1.0, 0.5, -2.0)),
    choices=st.sampled_from((1, 1, 1, 2)),
)
ACTIONS: st.SearchStrategy[Action] = st.one_of(
    st.builds(Together, st.lists(ADDS, min_size=1, max_size=5).map(tuple)),
    st.builds(Together, st.lists(ADDS, min_size=1, max_size=5).map(tuple)),
    st.builds(Steps, st.integers(1, 12)),
    st.builds(Abort, st.integers(0, 8)),
    st.builds(Register, st.sampled_from(NAMES), st.integers(0, len(CONTENTS) - 1)),
    st.builds(Unregister, st.sampled_from(NAMES)),
)


@dataclass(frozen=True)
class Budgets:
    """How little the engine has: blocks, adapter bytes above the largest adapter, tokens a step, rows."""

    blocks: int
    extra_adapter_share: float
    tokens_per_step: int
    rows: int
    caching: bool


BUDGETS = st.builds(
    Budgets,
    blocks=st.integers(-(-LONGEST // BLOCK_SIZE), 22),
    extra_adapter_share=st.sampled_from((0.0, 0.0, 0.2, 0.5)),
    tokens_per_step=st.integers(6, 24),
    rows=st.integers(3, 6),
    caching=st.booleans(),
)
