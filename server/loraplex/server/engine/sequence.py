"""One choice of one request on its way through the engine.

Knows tokens, blocks and state; nothing about text, tensors or transport.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from loraplex.server.engine.request import FinishReason, GenerationRequest


class SequenceStatus(enum.Enum):
    """Where a sequence is."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False)
class Sequence:
    """The mutable state of one choice.

    `num_computed_tokens` tokens of `token_ids` have keys and values in the blocks of `block_table`; the scheduler
    decides how many more the next step computes.
    """

    request: GenerationRequest
    choice: int
    arrival_s: float
    token_ids: list[int] = field(init=False)
    status: SequenceStatus = field(default=SequenceStatus.WAITING, init=False)
    block_table: list[int] = field(default_factory=list, init=False)
    num_computed_tokens: int = field(default=0, init=False)
    num_cached_tokens: int = field(default=0, init=False)
    """Prompt tokens found in the prefix cache at first admission; for usage."""
    adapter_missed_s: float | None = field(default=None, init=False)
    """When it could first have had a row but its adapter was not on the device."""
    first_scheduled_s: float | None = field(default=None, init=False)
    first_token_s: float | None = field(default=None, init=False)
    last_token_s: float | None = field(default=None, init=False)
    num_preemptions: int = field(default=0, init=False)
    finish_reason: FinishReason | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        """Start with the prompt."""
        self.token_ids = list(self.request.prompt_token_ids)
        assert 0 <= self.adapter_start < len(self.token_ids), "an adapter begins to act within the prompt"

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def output_token_ids(self) -> list[int]:
        """The generated tokens."""
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens whose keys and values are still to be computed; 1 while decoding."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def is_decoding(self) -> bool:
        """Whether the next step computes just the newest token, its prompt being done."""
        return self.num_computed_tokens >= self.num_prompt_tokens and self.num_uncomputed_tokens == 1

    @property
    def adapter_key(self) -> tuple[str | None, float]:
        """The effective weights: digest and scale; the base alone is (None, 1)."""
        digest = self.request.acting_digest
        return (digest, self.request.adapter_scale if digest else 1.0)

    @property
    def adapter_start(self) -> int:
        """The first token on which the adapter acts; without an adapter 0."""
        return self.request.adapter_start or 0
