"""Turns what happened in a step into the figures that the observer gets. Knows no metrics system."""

from __future__ import annotations

from dataclasses import dataclass, field

from loraplex.server.engine.block_manager import BlockManager
from loraplex.server.engine.scheduler import Scheduler, StepPlan
from loraplex.server.engine.sequence import Sequence
from loraplex.server.engine.stats import RequestStats, StepStats, TokenStats


@dataclass
class StepReport:
    """Collects one step."""

    plan: StepPlan
    _rows: list[TokenStats] = field(default_factory=list, init=False)

    def token(self, seq: Sequence, now: float) -> None:
        """Note that `seq` got a token at `now`, and stamp the sequence."""
        first = now - seq.arrival_s if seq.first_token_s is None else None
        between = now - seq.last_token_s if seq.last_token_s is not None else None
        seq.first_token_s = now if seq.first_token_s is None else seq.first_token_s
        seq.last_token_s = now
        # A prompt counts once for its request, when its first token proves that it was computed.
        prompt_tokens = seq.num_prompt_tokens if first is not None and seq.choice == 0 else 0
        self._rows.append(TokenStats(seq.request.adapter_name, prompt_tokens, first, between))

    def finish(self, scheduler: Scheduler, blocks: BlockManager, duration_s: float) -> StepStats:
        """Return the figures of the step."""
        digests = {item.seq.request.acting_digest for item in self.plan.scheduled}
        return StepStats(
            duration_s=duration_s,
            num_running=len(scheduler.running),
            num_waiting=scheduler.num_waiting,
            num_rows=len(self.plan.scheduled),
            num_tokens=sum(item.num_tokens for item in self.plan.scheduled),
            num_adapters=len(digests - {None}),
            tokens=tuple(self._rows),
            kv_cache_usage=blocks.usage,
            prefix_queries=scheduler.prefix_queries,
            prefix_hits=scheduler.prefix_hits,
            num_preemptions=scheduler.num_preemptions,
        )


def request_stats(seq: Sequence, now: float) -> RequestStats:
    """Return the figures of a sequence that ended at `now` (seconds, monotonic)."""
    assert seq.finish_reason is not None, "the sequence has not ended"
    scheduled, first, missed = seq.first_scheduled_s, seq.first_token_s, seq.adapter_missed_s
    return RequestStats(
        adapter_name=seq.request.adapter_name,
        finish_reason=seq.finish_reason,
        prompt_tokens=seq.num_prompt_tokens,
        generation_tokens=seq.num_output_tokens,
        cached_tokens=seq.num_cached_tokens,
        e2e_s=now - seq.arrival_s,
        queue_s=None if scheduled is None else scheduled - seq.arrival_s,
        adapter_wait_s=None if scheduled is None or missed is None else scheduled - missed,
        prefill_s=None if scheduled is None or first is None else first - scheduled,
        decode_s=None if first is None else now - first,
    )
