"""Which sequences compute how many tokens in the next step.

Decodes come first, then prompts that were begun, then waiting sequences, all under one token budget (chunked prefill:
Sarathi-Serve), the KV blocks and the adapter memory. When blocks run out, the sequence that was admitted last gives
its blocks back and is computed again later (preemption by recomputation).

Who is admitted next is decided between the heads of one queue per adapter (see `waiting`), after those who were
preempted. An adapter that floods the server therefore fills the rows nobody else wants and no more, and none waits
without bound. The adapters of those who are next are prefetched.

Knows sequences, block and row counts; imports no torch and never sees a weight.
"""

from __future__ import annotations

import enum
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import Protocol

from loraplex.server.config import EngineConfig
from loraplex.server.engine.block_manager import BlockManager
from loraplex.server.engine.sequence import Sequence, SequenceStatus
from loraplex.server.engine.waiting import AdapterKey, WaitingQueues
from loraplex.server.errors import LoraplexError, ResourceExhaustedError

MAX_ADAPTER_NAMES = 100
"""Waiting adapters that are told to the observer; there may be thousands."""


class Residency(enum.Enum):
    """Whether an adapter's weights can be used in the next step."""

    RESIDENT = "resident"
    LOADING = "loading"
    NO_ROOM = "no room"
    FAILED = "failed"


class AdapterSlots(Protocol):
    """What the scheduler asks of the adapter memory."""

    def require(self, digest: str) -> Residency:
        """Say where the adapter is, and begin to load it if it is nowhere."""

    def prefetch(self, digest: str) -> Residency:
        """Say where an adapter is that cannot be used yet, and begin to bring it nearer."""

    def failure(self, digest: str) -> LoraplexError:
        """Return why loading failed; the next `require` tries again."""

    def retain(self, digest: str) -> None:
        """Keep a resident adapter while one more row uses it."""

    def release(self, digest: str) -> None:
        """Undo one `retain`."""


@dataclass(frozen=True)
class ScheduledSequence:
    """`num_tokens` tokens of `seq` are computed in this step, from `seq.num_computed_tokens` on."""

    seq: Sequence
    num_tokens: int

    @property
    def samples(self) -> bool:
        """Whether this step reaches the sequence's last token, so that a new one is chosen."""
        return self.num_tokens == self.seq.num_uncomputed_tokens


@dataclass(frozen=True)
class StepPlan:
    """One step: what is computed, and what cannot be because its adapter cannot be loaded (the caller ends those)."""

    scheduled: tuple[ScheduledSequence, ...]
    failed: tuple[tuple[Sequence, LoraplexError], ...]


class Scheduler:
    """Owns the queues; moves sequences between waiting and running."""

    def __init__(self, config: EngineConfig, blocks: BlockManager, slots: AdapterSlots) -> None:
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self.prefix_queries = 0
        """Prompt tokens looked up in the prefix cache by admitted sequences."""
        self.prefix_hits = 0
        """Prompt tokens found there."""
        self._config = config
        self._blocks = blocks
        self._slots = slots
        self._preempted: deque[Sequence] = deque()
        self._waiting = WaitingQueues(config.max_wait_s)
        self._changes = 0  # of the queues
        self._upcoming: tuple[int, tuple[Sequence, ...]] = (-1, ())  # at that change: whose adapters to prefetch

    @property
    def num_waiting(self) -> int:
        """Sequences that hold no row."""
        return len(self._preempted) + len(self._waiting)

    @property
    def running_adapters(self) -> frozenset[str]:
        """Names of the adapters that have rows."""
        return frozenset(seq.request.adapter_name for seq in self.running if seq.request.acting_digest is not None)

    @property
    def waiting_adapters(self) -> frozenset[str]:
        """Names of adapters that requests wait for, `MAX_ADAPTER_NAMES` at most."""
        return self._waiting.adapter_names(MAX_ADAPTER_NAMES)

    @property
    def has_work(self) -> bool:
        """Whether any sequence is waiting or running."""
        return bool(self.running or self._preempted or self._waiting)

    def sequences(self) -> Iterator[Sequence]:
        """Every sequence that is not finished."""
        return chain(self.running, self._preempted, self._waiting)

    def add(self, seq: Sequence, *, accepted: bool = False) -> None:
        """Put a new sequence at the end of its adapter's queue.

        Raises:
            ResourceExhaustedError: if `max_waiting` sequences wait already, unless it belongs to an `accepted` request.
        """
        if self.num_waiting >= self._config.max_waiting and not accepted:
            raise ResourceExhaustedError(
                f"{self.num_waiting} sequences are waiting already, as many as max_waiting allows", retry_after_s=1.0
            )
        self._waiting.add(seq)
        self._changes += 1

    def finish(self, seq: Sequence) -> None:
        """Take a sequence out, wherever it is, and give back what it holds."""
        if seq.status is SequenceStatus.RUNNING:
            self.running.remove(seq)
            self._give_back(seq)
        elif seq in self._preempted:
            self._preempted.remove(seq)
        else:
            self._waiting.remove(seq)
        self._changes += 1
        seq.status = SequenceStatus.FINISHED

    def schedule(self, now: float) -> StepPlan:
        """Decide the next step at time `now` (seconds on the monotonic clock)."""
        failed: list[tuple[Sequence, LoraplexError]] = []
        scheduled = self._schedule_running()
        budget = self._config.max_num_batched_tokens - sum(s.num_tokens for s in scheduled)
        admitted = self._admit(now, failed)
        while budget > 0 and (seq := next(admitted, None)) is not None:
            tokens = min(seq.num_uncomputed_tokens, budget)
            scheduled.append(ScheduledSequence(seq, tokens))
            budget -= tokens
        self._prefetch(now, failed)
        return StepPlan(tuple(scheduled), tuple(failed))

    def _schedule_running(self) -> list[ScheduledSequence]:
        budget = self._config.max_num_batched_tokens
        scheduled: dict[Sequence, int] = {}
        decodes = [seq for seq in self.running if seq.is_decoding]
        prefills = [seq for seq in self.running if not seq.is_decoding]
        for seq in decodes + prefills:
            if budget == 0:
                break
            if seq.status is not SequenceStatus.RUNNING:
                continue  # preempted for the sake of an earlier one
            tokens = min(seq.num_uncomputed_tokens, budget)
            while not self._blocks.grow(seq, seq.num_computed_tokens + tokens):
                victim = self.running[-1]
                budget += scheduled.pop(victim, 0)
                self._preempt(victim)
                if victim is seq:
                    break
            else:
                scheduled[seq] = tokens
                budget -= tokens
        return [ScheduledSequence(seq, tokens) for seq, tokens in scheduled.items()]

    def _admit(self, now: float, failed: list[tuple[Sequence, LoraplexError]]) -> Iterator[Sequence]:
        """Admit waiting sequences one by one, as long as the caller asks for more and rows, blocks and slots last."""
        if len(self.running) >= self._config.max_num_seqs:
            return
        rows = self._rows()
        draining = False
        for head in chain(tuple(self._preempted), self._waiting.heads(rows, now)):
            if len(self.running) >= self._config.max_num_seqs:
                return
            if head.request.acting_digest is not None:
                residency = Residency.NO_ROOM if draining else self._residency(head, failed)
                if residency is Residency.NO_ROOM and self._waiting.is_overdue(head, now):
                    draining = True  # no further row on any adapter until enough end for these weights to fit
                if residency is not Residency.RESIDENT:
                    head.adapter_missed_s = now if head.adapter_missed_s is None else head.adapter_missed_s
                    continue  # its own requests wait, others do not
            if not self._reserve(head):
                return
            self._start(head, now)
            rows[head.request.acting_digest] += 1
            yield head

    def _residency(self, head: Sequence, failed: list[tuple[Sequence, LoraplexError]]) -> Residency:
        digest = head.request.acting_digest
        assert digest is not None, "the base needs no slot"
        residency = self._slots.require(digest)
        if residency is Residency.FAILED:
            failed.append((head, self._slots.failure(digest)))
        return residency

    def _prefetch(self, now: float, failed: list[tuple[Sequence, LoraplexError]]) -> None:
        """Bring the adapters nearer that the next batch of rows will need, as far as can be told now."""
        if self._upcoming[0] != self._changes:
            heads = chain(tuple(self._preempted), self._waiting.heads(self._rows(), now))
            upcoming = (head for head in heads if head.request.acting_digest is not None)
            self._upcoming = (self._changes, tuple(islice(upcoming, self._config.max_num_seqs)))
        told = {id(seq) for seq, _ in failed}
        for head in self._upcoming[1]:
            digest = head.request.acting_digest
            if digest is not None and id(head) not in told and self._slots.prefetch(digest) is Residency.FAILED:
                failed.append((head, self._slots.failure(digest)))

    def _rows(self) -> Counter[AdapterKey]:
        return Counter(seq.request.acting_digest for seq in self.running)

    def _reserve(self, seq: Sequence) -> bool:
        """Take cached and fresh blocks for all tokens of `seq`; return False, with nothing taken, if they lack."""
        found = self._blocks.match_prefix(seq)
        # One block a running row stays free for the tokens to come, or the newcomer would be preempted at once.
        spare = len(self.running)
        if not self._blocks.grow(seq, len(seq.token_ids), spare):
            self._blocks.free(seq)
            return False
        if seq.first_scheduled_s is None:
            seq.num_cached_tokens = found
            self.prefix_queries += seq.num_prompt_tokens
            self.prefix_hits += found
        return True

    def _start(self, seq: Sequence, now: float) -> None:
        if seq in self._preempted:
            self._preempted.remove(seq)
        else:
            self._waiting.remove(seq)
        self._changes += 1
        self._waiting.note_admission(seq.request.acting_digest, now)
        if seq.request.acting_digest is not None:
            self._slots.retain(seq.request.acting_digest)
        seq.status = SequenceStatus.RUNNING
        seq.first_scheduled_s = now if seq.first_scheduled_s is None else seq.first_scheduled_s
        self.running.append(seq)

    def _preempt(self, seq: Sequence) -> None:
        self.running.remove(seq)
        self._give_back(seq)
        seq.status = SequenceStatus.WAITING
        seq.num_preemptions += 1
        self.num_preemptions += 1
        # The youngest goes first, so the one pushed last is the oldest of them and comes back first.
        self._preempted.appendleft(seq)
        self._changes += 1

    def _give_back(self, seq: Sequence) -> None:
        self._blocks.free(seq)
        if seq.request.acting_digest is not None:
            self._slots.release(seq.request.acting_digest)
