"""Decode steps on a CPU, captured: the decoder's kernel calls are recorded once and then run as one native program.

Between two kernels of a layer the decoder spends as much time in Python as in some of them, and holds the lock that
the server's other threads wait for. Steps in which every row has one token differ in little: embeddings, rotations,
block tables, segments. These are set anew; the rest is replayed. What PyTorch itself computes cannot be recorded, so a
decoder that asks it for anything between two kernels is run as ever.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from loraplex.server.attention.cpu import CpuAttention
from loraplex.server.engine.batch import Batch
from loraplex.server.engine.kv_cache import KVCache
from loraplex.server.lora.ops.cpu import CpuLoraOps
from loraplex.server.lora.ops.interface import LoraContext
from loraplex.server.models.decoder import Decoder
from loraplex.server.models.layer import Step
from loraplex.server.models.pointwise import CpuRotation
from loraplex.server.native.program import Program, StepArguments, record
from loraplex.server.native.workspace import Workspace, alias, memory_from

_log = logging.getLogger(__name__)

# Recorded at a time, each for one number of rows and one set of sites that adapters touch; about 300 KB of arguments.
MOST_PROGRAMS = 32

_VIEWS = frozenset(
    f"aten::{name}" for name in ("view", "slice", "_unsafe_view", "_reshape_alias", "alias", "detach", "lift_fresh")
)


class _NotRecordable(Exception):
    """PyTorch was asked to compute."""


class _ViewsOnly(TorchDispatchMode):  # type: ignore[no-untyped-call]  # PyTorch's own annotations are missing
    """Lets nothing through that computes: its result would be missing from the program."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name not in _VIEWS:
            raise _NotRecordable(name)
        return func(*args, **(kwargs or {}))

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Spare us PyTorch's compiler, which it would import to be skipped: a second, at the first recording."""
        return False


@dataclass(frozen=True)
class _Captured:
    """A program and where its inputs and its result lie: x (T, hidden), angles (T, rotary_dim), logits (T, vocab)."""

    program: Program
    x: torch.Tensor
    angles: torch.Tensor | None
    logits: torch.Tensor


class CapturedDecoder:
    """A `ForwardPass`: what `decoder` computes, the same bits, sooner. Belongs to one engine and one KV cache.

    The logits that it returns may change with the next call.
    """

    def __init__(self, decoder: Decoder) -> None:
        """Record nothing yet."""
        self._decoder = decoder
        self._workspace = Workspace()
        self._captured: OrderedDict[Hashable, _Captured] = OrderedDict()
        self._recordable = isinstance(decoder.attention, CpuAttention)
        self._kv_cache: KVCache | None = None

    @torch.inference_mode()
    def forward(self, batch: Batch, kv_cache: KVCache, lora: LoraContext | None) -> torch.Tensor:
        """See `Decoder.forward`."""
        steps = self._step_arguments(batch, kv_cache, lora) if self._recordable else None
        if steps is None:
            return self._decoder.forward(batch, kv_cache, lora)
        assert self._kv_cache in (None, kv_cache), "recorded calls have the addresses of one KV cache"
        x, rotation = self._decoder.inputs(batch, None)
        assert rotation is None or isinstance(rotation, CpuRotation), "a CPU's decoder rotates with kernels"
        key = (len(x), torch.get_num_threads(), *_lora_key(lora))
        captured = self._captured.get(key)
        if captured is None:
            captured = self._capture(key, batch, kv_cache, lora, x, rotation)
            if captured is None:
                return self._decoder.forward(batch, kv_cache, lora)
        self._captured.move_to_end(key)
        captured.x.copy_(x)
        if rotation is not None and captured.angles is not None:
            captured.angles.copy_(rotation.angles)
        for step in steps:
            captured.program.update(step)
        captured.program.run(torch.get_num_threads())
        return captured.logits

    def _step_arguments(self, batch: Batch, kv_cache: KVCache, lora: LoraContext | None) -> list[StepArguments] | None:
        """Return what is new in this step; None if it is not one of those that are captured."""
        if len(batch.logits_indices) != len(batch.token_ids) or batch.num_decodes != len(batch.query_lens_cpu):
            return None
        steps = [self._attention(batch, kv_cache)]
        if lora is not None:
            if lora.overrides is not None or not isinstance(lora.ops, CpuLoraOps):
                return None
            # Every row's one token is its last, so lm_head's adapters are the layers'.
            steps.append(lora.ops.step_arguments(lora.tokens))
        return None if None in steps else [step for step in steps if step is not None]

    def _attention(self, batch: Batch, kv_cache: KVCache) -> StepArguments | None:
        attention, config = self._decoder.attention, self._decoder.config
        assert isinstance(attention, CpuAttention), "asked for in the constructor"
        return attention.step_arguments(batch, kv_cache.layers[0], config.num_heads, self._decoder.dtype)

    def _capture(
        self,
        key: Hashable,
        batch: Batch,
        kv_cache: KVCache,
        lora: LoraContext | None,
        x: torch.Tensor,
        rotation: CpuRotation | None,
    ) -> _Captured | None:
        """Record a step like this one; None, from now on for all steps, if PyTorch computes in it."""
        workspace = self._workspace
        own_x = workspace.empty(*x.shape, dtype=x.dtype)
        angles = None if rotation is None else workspace.empty(*rotation.angles.shape, dtype=rotation.angles.dtype)
        step = Step(batch, None if angles is None else CpuRotation(angles), lora)
        try:
            with memory_from(workspace), record() as recording, _ViewsOnly():  # type: ignore[no-untyped-call]
                logits = self._decoder.forward_all(own_x, step, kv_cache)
        except _NotRecordable as error:
            _log.info("decode steps are not captured: the decoder asks PyTorch for %s", error)
            self._recordable = False
            return None
        self._kv_cache = kv_cache
        program = Program(recording)
        captured = _Captured(program, alias(own_x), None if angles is None else alias(angles), alias(logits))
        self._captured[key] = captured
        if len(self._captured) > MOST_PROGRAMS:
            self._captured.popitem(last=False)
        return captured


def _lora_key(lora: LoraContext | None) -> tuple[Hashable, ...]:
    if lora is None:
        return ()
    assert isinstance(lora.ops, CpuLoraOps), "asked before"
    return (lora.ops.touched(lora.tokens),)
