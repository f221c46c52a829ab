"""The loop: drain commands, schedule, run, sample, publish. One thread owns all of it.

Knows no transport: commands come in and outputs go out as plain values (see `client` for the asyncio side).
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass

from loraplex.server.engine.active_request import ActiveRequest
from loraplex.server.engine.block_manager import BlockManager
from loraplex.server.engine.commands import (
    AbortRequest,
    AdapterForgotten,
    AddRequest,
    Command,
    ForgetAdapter,
    PinAdapter,
    Stop,
    UnpinAdapter,
)
from loraplex.server.engine.model_runner import ModelRunner
from loraplex.server.engine.request import ChoiceDelta, FinishReason, Logprobs, RequestOutput
from loraplex.server.engine.scheduler import ScheduledSequence, Scheduler, StepPlan
from loraplex.server.engine.sequence import Sequence as EngineSequence
from loraplex.server.engine.stats import AdapterMemory, EngineObserver, FreedMemory
from loraplex.server.engine.step_report import StepReport, request_stats
from loraplex.server.errors import DeadlineError, EngineError, LoraplexError, UnavailableError
from loraplex.server.lora.tiers import AdapterTiers
from loraplex.server.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

EngineOutput = RequestOutput | AdapterForgotten
Publish = Callable[[Sequence[EngineOutput]], None]
"""Takes the outputs of one step; called on the engine thread, must not block."""


@dataclass(frozen=True)
class EngineParts:
    """What the engine is put together from; see `build`."""

    runner: ModelRunner
    scheduler: Scheduler
    blocks: BlockManager
    slots: AdapterTiers
    tokenizer: Tokenizer
    eos_token_ids: frozenset[int]
    max_model_len: int


class Engine:
    """Answers requests, many adapters in every step."""

    def __init__(self, parts: EngineParts, publish: Publish, observer: EngineObserver) -> None:
        self._parts = parts
        self._publish = publish
        self._observer = observer
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._wake = threading.Event()
        self._active: dict[str, ActiveRequest] = {}
        self._outputs: list[EngineOutput] = []
        self._forgetting: dict[str, list[int]] = {}  # tickets by digest, while requests still use it
        self._slots_revision = -1  # so that the first step reports
        self._adapters: tuple[Set[str], Set[str]] = (frozenset(), frozenset())
        self._stopped = False

    @property
    def has_work(self) -> bool:
        """Whether any request is alive."""
        return bool(self._active)

    @property
    def resident(self) -> frozenset[str]:
        """Digests of the adapters on the device; may be read from any thread."""
        return self._parts.slots.resident

    @property
    def held(self) -> frozenset[str]:
        """Digests of the adapters in either tier of the memory; may be read from any thread."""
        return self._parts.slots.held

    def memory(self, digest: str) -> AdapterMemory:
        """Return what an adapter takes of the memory's budgets now; may be called from any thread."""
        return self._parts.slots.memory(digest)

    @property
    def active_requests(self) -> int:
        """Living requests; may be read from any thread."""
        return len(self._active)

    def submit(self, command: Command) -> None:
        """Hand over a command, from any thread; it takes effect at the next step boundary."""
        self._commands.put(command)
        self._wake.set()

    def wake(self) -> None:
        """Make a sleeping loop look again, from any thread."""
        self._wake.set()

    def run(self) -> None:
        """Loop until a Stop command; sleeps while there is nothing to do."""
        while not self._stopped:
            # Cleared before the step looks: what comes while it looks leaves the flag set, and nothing is slept over.
            self._wake.clear()
            if not self.step() and not self._stopped:
                self._wake.wait()
        self._parts.slots.close()

    def step(self) -> bool:
        """Do one step; return False if there was nothing to run (no request, or all wait for their adapters)."""
        start = time.monotonic()
        self._drain_commands()
        self._parts.slots.poll()
        self._expire(start)
        plan = self._parts.scheduler.schedule(start)
        plan = self._without_failed(plan)
        if plan.scheduled:
            self._run(plan, start)
        else:
            scheduler = self._parts.scheduler
            self._observer.on_queue(len(scheduler.running), scheduler.num_waiting, self._parts.blocks.usage)
        self._forget_unused()
        self._report_adapters()
        self._flush()
        return bool(plan.scheduled)

    def _without_failed(self, plan: StepPlan) -> StepPlan:
        """End the requests whose adapters cannot be loaded; return what is left to run.

        Several choices of one request may fail in one step, or one fail and another be scheduled.
        """
        for seq, error in plan.failed:
            if (active := self._active.get(seq.request.request_id)) is not None:
                self._fail(active, error)
        if not plan.failed:
            return plan
        alive = tuple(item for item in plan.scheduled if item.seq.request.request_id in self._active)
        return StepPlan(alive, failed=())

    def _drain_commands(self) -> None:
        while True:
            try:
                command = self._commands.get_nowait()
            except queue.Empty:
                return
            match command:
                case AddRequest(request):
                    self._add(ActiveRequest(request, time.monotonic(), self._parts.tokenizer))
                case AbortRequest(request_id):
                    self._abort(request_id)
                case PinAdapter(digest):
                    self._answer_forgets(digest, FreedMemory())  # it has a name again
                    self._parts.slots.pin(digest)
                case UnpinAdapter(digest):
                    self._parts.slots.unpin(digest)
                case ForgetAdapter(digest, ticket):
                    self._parts.slots.unpin(digest)
                    self._forgetting.setdefault(digest, []).append(ticket)
                case Stop():
                    self._stop()
                    return

    def _add(self, active: ActiveRequest) -> None:
        request_id = active.request.request_id
        assert request_id not in self._active, f"request id {request_id} is in use"
        self._active[request_id] = active
        try:
            self._parts.scheduler.add(active.start_first())
        except LoraplexError as error:
            del self._active[request_id]
            self._outputs.append(RequestOutput(request_id, finished=True, error=error))

    def _abort(self, request_id: str) -> None:
        active = self._active.get(request_id)
        if active is not None:
            self._end(active, FinishReason.ABORT)

    def _expire(self, now: float) -> None:
        late = [a for a in self._active.values() if a.request.deadline is not None and a.request.deadline < now]
        for active in late:
            self._fail(active, DeadlineError("the deadline passed before the answer was complete"))

    def _run(self, plan: StepPlan, start: float) -> None:
        parts = self._parts
        report = StepReport(plan)
        try:
            results = parts.runner.run(plan.scheduled, parts.slots.slot_of, parts.slots.slots)
        except Exception as error:
            logger.exception("a step failed; its requests are lost, the server goes on")
            self._fail_step(plan, EngineError(f"the step failed: {type(error).__name__}: {error}"))
            return
        now = time.monotonic()
        self._advance(plan)
        self._collect(plan, results, report, now)
        self._observer.on_step(report.finish(parts.scheduler, parts.blocks, now - start))

    def _advance(self, plan: StepPlan) -> None:
        """Record that the planned tokens have keys and values now."""
        for item in plan.scheduled:
            computed = item.seq.num_computed_tokens
            item.seq.num_computed_tokens = computed + item.num_tokens
            self._parts.blocks.publish(item.seq, computed)

    def _collect(
        self,
        plan: StepPlan,
        results: Mapping[ScheduledSequence, Logprobs | EngineError],
        report: StepReport,
        now: float,
    ) -> None:
        """Append the new tokens, end what is complete, and make the outputs of this step."""
        deltas: dict[str, list[ChoiceDelta]] = {}
        for item in plan.scheduled:
            result = results.get(item)
            active = self._active.get(item.seq.request.request_id)
            if result is None or active is None:
                continue  # a part of a prompt, or a request that another of its choices has just failed
            if isinstance(result, EngineError):
                self._fail(active, result)
                continue
            delta = active.append(item.seq, result, self._parts.eos_token_ids, self._parts.max_model_len)
            report.token(item.seq, now)
            self._start_rest(active)
            if item.seq.finish_reason is not None:
                self._finish(item.seq, now)
            deltas.setdefault(active.request.request_id, []).append(delta)
        for request_id, choices in deltas.items():
            if request_id in self._active:
                self._emit(self._active[request_id], choices)

    def _start_rest(self, active: ActiveRequest) -> None:
        for seq in active.start_rest():
            self._parts.scheduler.add(seq, accepted=True)

    def _emit(self, active: ActiveRequest, choices: list[ChoiceDelta]) -> None:
        finished = active.is_finished
        request = active.request
        if finished:
            del self._active[request.request_id]
        self._outputs.append(
            RequestOutput(
                request.request_id,
                choices=tuple(choices),
                finished=finished,
                usage=active.usage if finished else None,
                adapter_digest=request.acting_digest,
            )
        )

    def _finish(self, seq: EngineSequence, now: float) -> None:
        self._parts.scheduler.finish(seq)
        self._observer.on_request(request_stats(seq, now))

    def _end(self, active: ActiveRequest, reason: FinishReason) -> None:
        now = time.monotonic()
        del self._active[active.request.request_id]
        for seq in active.unfinished:
            seq.finish_reason = reason
            self._finish(seq, now)

    def _fail(self, active: ActiveRequest, error: LoraplexError) -> None:
        self._end(active, FinishReason.ERROR)
        self._outputs.append(RequestOutput(active.request.request_id, finished=True, error=error))

    def _fail_step(self, plan: StepPlan, error: EngineError) -> None:
        for request_id in {item.seq.request.request_id for item in plan.scheduled}:
            self._fail(self._active[request_id], error)

    def _forget_unused(self) -> None:
        """Drop the adapters that no name has and no request uses any more."""
        if not self._forgetting:
            return
        used = {active.request.acting_digest for active in self._active.values()}
        for digest in self._forgetting.keys() - used:
            self._answer_forgets(digest, self._parts.slots.forget(digest))

    def _answer_forgets(self, digest: str, freed: FreedMemory) -> None:
        for ticket in self._forgetting.pop(digest, ()):
            self._outputs.append(AdapterForgotten(ticket, freed))
            freed = FreedMemory()  # bytes come free once, however many asked

    def _report_adapters(self) -> None:
        slots, scheduler = self._parts.slots, self._parts.scheduler
        adapters = (scheduler.running_adapters, scheduler.waiting_adapters)
        if adapters != self._adapters:
            self._adapters = adapters
            self._observer.on_adapters(*adapters)
        if slots.revision != self._slots_revision:
            self._slots_revision = slots.revision
            self._observer.on_memory(slots.stats, slots.take_load_stats())

    def _flush(self) -> None:
        if self._outputs:
            self._publish(self._outputs)
            self._outputs = []

    def _stop(self) -> None:
        self._stopped = True
        for active in list(self._active.values()):
            self._fail(active, UnavailableError("the server is stopping"))
