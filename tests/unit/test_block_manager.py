"""The block manager: property tests of ownership, and who may share a prefix with whom."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from loraplex.server.engine.block_manager import BlockManager
from loraplex.server.engine.request import GenerationRequest, SamplingParams
from loraplex.server.engine.sequence import Sequence

BLOCK = 4


def make_sequence(
    tokens: list[int], digest: str | None = None, scale: float = 1.0, salt: str = "", start: int | None = 0
) -> Sequence:
    request = GenerationRequest(
        "r",
        tuple(tokens),
        SamplingParams(seed=0),
        adapter_digest=digest,
        adapter_scale=scale,
        adapter_start=start,
        cache_salt=salt,
    )
    return Sequence(request, 0, 0.0)


def compute(blocks: BlockManager, seq: Sequence, tokens: int) -> None:
    """Play the part of scheduler and runner for the next `tokens` tokens."""
    old = seq.num_computed_tokens
    assert blocks.grow(seq, old + tokens)
    seq.num_computed_tokens = old + tokens
    blocks.publish(seq, old)


class BlockManagerMachine(RuleBasedStateMachine):
    """Any order of admissions, steps and frees keeps counts, free list and keys consistent."""

    sequences = Bundle("sequences")

    def __init__(self) -> None:
        super().__init__()
        self.blocks = BlockManager(num_blocks=12, block_size=BLOCK)
        self.living: list[Sequence] = []

    @rule(
        target=sequences,
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=20),
        digest=st.sampled_from([None, "a", "b"]),
        start=st.one_of(st.none(), st.integers(0, 19)),
    )
    def admit(self, tokens: list[int], digest: str | None, start: int | None) -> Sequence:
        seq = make_sequence(tokens, digest, start=None if start is None else start % len(tokens))
        found = self.blocks.match_prefix(seq)
        assert found % BLOCK == 0
        assert found < len(tokens)
        if self.blocks.grow(seq, len(tokens)):
            self.living.append(seq)
        else:
            self.blocks.free(seq)
        return seq

    @rule(seq=sequences, tokens=st.integers(1, 6))
    def step(self, seq: Sequence, tokens: int) -> None:
        if seq in self.living and seq.num_uncomputed_tokens:
            compute(self.blocks, seq, min(tokens, seq.num_uncomputed_tokens))

    @rule(seq=sequences, token=st.integers(0, 1))
    def append(self, seq: Sequence, token: int) -> None:
        if seq in self.living and self.blocks.grow(seq, len(seq.token_ids) + 1):
            seq.token_ids.append(token)

    @rule(seq=consumes(sequences))
    def free(self, seq: Sequence) -> None:
        if seq in self.living:
            self.living.remove(seq)
            self.blocks.free(seq)
            assert seq.block_table == []

    @invariant()
    def consistent(self) -> None:
        self.blocks.check_integrity(self.living)


BlockManagerMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestBlockManager = BlockManagerMachine.TestCase


PROMPT = list(range(10))


def fill_and_free(blocks: BlockManager, seq: Sequence) -> None:
    blocks.match_prefix(seq)
    compute(blocks, seq, seq.num_uncomputed_tokens)
    blocks.free(seq)


def test_equal_prompts_share_full_blocks() -> None:
    blocks = BlockManager(8, BLOCK)
    fill_and_free(blocks, make_sequence(PROMPT))
    again = make_sequence(PROMPT)
    assert blocks.match_prefix(again) == 8
    assert again.num_computed_tokens == 8


def test_the_last_token_is_always_computed() -> None:
    blocks = BlockManager(8, BLOCK)
    fill_and_free(blocks, make_sequence(PROMPT[:8]))
    assert blocks.match_prefix(make_sequence(PROMPT[:8])) == 4


@pytest.mark.parametrize(
    "other",
    [
        {"digest": "sha256:b"},
        {"digest": None},
        {"digest": "sha256:a", "scale": 0.5},
        {"digest": "sha256:a", "salt": "tenant-2"},
    ],
)
def test_other_weights_or_salt_never_share(other: dict[str, object]) -> None:
    blocks = BlockManager(8, BLOCK)
    fill_and_free(blocks, make_sequence(PROMPT, "sha256:a"))
    assert blocks.match_prefix(make_sequence(PROMPT, **other)) == 0  # type: ignore[arg-type]


@dataclass(frozen=True)
class Prompt:
    """A prompt of few different tokens, and what acts on it from where on."""

    tokens: list[int]
    digest: str | None
    scale: float
    salt: str
    start: int | None

    def sequence(self) -> Sequence:
        return make_sequence(self.tokens, self.digest, self.scale, self.salt, self.start)

    def weights_upto(self, end: int) -> object:
        """All that the keys and values of the first `end` tokens come from, beside the tokens."""
        if self.digest is None or self.start is None or end <= self.start:
            return self.salt
        return (self.salt, self.digest, self.scale, self.start)


@st.composite
def prompts(draw: st.DrawFn) -> Prompt:
    tokens = draw(st.lists(st.integers(0, 1), min_size=1, max_size=18))
    return Prompt(
        [0] * len(tokens) if draw(st.booleans()) else tokens,
        draw(st.sampled_from([None, "a", "a", "b"])),
        draw(st.sampled_from([1.0, 1.0, 0.5])),
        draw(st.sampled_from(["", "", "s"])),
        draw(st.one_of(st.none(), st.integers(0, len(tokens) - 1))),
    )


@settings(max_examples=300, deadline=None)
@given(first=prompts(), second=prompts())
def test_blocks_are_shared_exactly_where_tokens_and_effective_weights_are_equal(first: Prompt, second: Prompt) -> None:
    blocks = BlockManager(16, BLOCK)
    fill_and_free(blocks, first.sequence())
    shared = 0
    for end in range(BLOCK, min(len(first.tokens), len(second.tokens) - 1) + 1, BLOCK):
        alike = first.tokens[:end] == second.tokens[:end] and first.weights_upto(end) == second.weights_upto(end)
        shared = end if alike else shared
    assert blocks.match_prefix(second.sequence()) == shared


def test_an_activated_adapter_shares_with_the_base_what_comes_before() -> None:
    blocks = BlockManager(16, BLOCK)
    fill_and_free(blocks, make_sequence(PROMPT, None))
    activated = make_sequence(PROMPT, "sha256:a", start=6)
    assert blocks.match_prefix(activated) == 4
    compute(blocks, activated, activated.num_uncomputed_tokens)
    blocks.free(activated)
    assert blocks.match_prefix(make_sequence(PROMPT, "sha256:a", start=6)) == 8
    assert blocks.match_prefix(make_sequence(PROMPT, "sha256:a", start=5)) == 4
    assert blocks.match_prefix(make_sequence(PROMPT, "sha256:a")) == 0
    assert blocks.match_prefix(make_sequence(PROMPT, "sha256:a", start=None)) == 8


def test_the_scale_of_no_adapter_does_not_matter() -> None:
    blocks = BlockManager(8, BLOCK)
    fill_and_free(blocks, make_sequence(PROMPT, None, scale=1.0))
    assert blocks.match_prefix(make_sequence(PROMPT, None, scale=0.5)) == 8


def test_a_block_in_use_is_shared_while_its_owner_runs() -> None:
    blocks = BlockManager(8, BLOCK)
    first, second = make_sequence(PROMPT), make_sequence(PROMPT)
    blocks.match_prefix(first)
    compute(blocks, first, 10)
    assert blocks.match_prefix(second) == 8
    assert second.block_table == first.block_table[:2]
    blocks.free(first)
    blocks.check_integrity([second])


def test_growing_past_the_pool_changes_nothing() -> None:
    blocks = BlockManager(2, BLOCK)
    seq = make_sequence(list(range(12)))
    assert not blocks.grow(seq, 12)
    assert seq.block_table == []
    assert blocks.num_free_blocks == 2


def test_caching_off_finds_nothing() -> None:
    blocks = BlockManager(8, BLOCK, caching=False)
    fill_and_free(blocks, make_sequence(PROMPT))
    assert blocks.match_prefix(make_sequence(PROMPT)) == 0


def test_no_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one block"):
        BlockManager(0, BLOCK)
