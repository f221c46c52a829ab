"""How tests of the engine make requests, run it, and collect what it publishes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from loraplex.server.engine.commands import (
    AdapterForgotten,
)
from loraplex.server.engine.engine import Engine, EngineOutput
from loraplex.server.engine.request import GenerationRequest, RequestOutput, SamplingParams
from loraplex.server.engine.stats import FreedMemory


@dataclass
class Outbox:
    """Collects what the engine publishes."""

    outputs: dict[str, list[RequestOutput]] = field(default_factory=dict)
    forgotten: dict[int, FreedMemory] = field(default_factory=dict)

    def __call__(self, outputs: Sequence[EngineOutput]) -> None:
        for output in outputs:
            if isinstance(output, AdapterForgotten):
                assert output.ticket not in self.forgotten, "a ticket is answered once"
                self.forgotten[output.ticket] = output.freed
            else:
                self.outputs.setdefault(output.request_id, []).append(output)

    def tokens(self, request_id: str, choice: int = 0) -> list[int]:
        deltas = [c for o in self.outputs.get(request_id, []) for c in o.choices if c.index == choice]
        return [t for delta in deltas for t in delta.token_ids]

    def last(self, request_id: str) -> RequestOutput:
        return self.outputs[request_id][-1]


def request(name: str, prompt: Sequence[int], **changes: object) -> GenerationRequest:
    names = ("max_tokens", "stop", "stop_token_ids", "ignore_eos", "n", "logprobs")
    params = {key: changes.pop(key) for key in names if key in changes}
    return GenerationRequest(
        name,
        tuple(prompt),
        SamplingParams(seed=1, **{"max_tokens": 8, **params}),  # type: ignore[arg-type]
        **changes,  # type: ignore[arg-type]
    )


def run(engine: Engine, limit: int = 5000) -> None:
    for _ in range(limit):
        engine.step()
        if not engine.has_work:
            return
    pytest.fail("the engine still has work")


def check_integrity(engine: Engine) -> None:
    parts = engine._parts
    parts.blocks.check_integrity(list(parts.scheduler.sequences()))
    parts.slots.check_integrity()
