"""The memory that captured decode steps read their batch from; refilled for every step, by one copy.

Knows nothing of adapters, weights or graphs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from loraplex.server.engine.batch import Batch
from loraplex.server.engine.capture import CaptureBackend, Wait
from loraplex.server.lora.buffer import Buffer


@dataclass(frozen=True)
class StepLimits:
    """The largest decode step: rows, tokens of a row's context, tokens of a KV block, and a block that is nobody's."""

    max_rows: int
    max_context: int
    block_size: int
    scratch_block: int

    @property
    def max_blocks(self) -> int:
        """Entries of a row's block table."""
        return -(-self.max_context // self.block_size)


@dataclass(frozen=True)
class _Fields:
    """One step's numbers, side by side in one memory; shapes as in `Batch`, for `max_rows` rows."""

    memory: torch.Tensor
    token_ids: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    context_lens: torch.Tensor
    block_tables: torch.Tensor

    @classmethod
    def into(cls, limits: StepLimits, memory: torch.Tensor) -> _Fields:
        return cls(memory, *_lay_out(Buffer(memory), limits))


class StepBuffers:
    """Owns the memory on the device, and two of the host's that take turns: one is filled while the other is copied."""

    def __init__(self, limits: StepLimits, backend: CaptureBackend, device: torch.device) -> None:
        self.limits = limits
        self._backend = backend
        counted = Buffer()
        _lay_out(counted, limits)
        self._device = _Fields.into(limits, torch.zeros(counted.nbytes, dtype=torch.uint8, device=device))
        self._host = [_Fields.into(limits, backend.staging(counted.nbytes)) for _ in range(2)]
        self._copied: list[Wait] = [_no_wait, _no_wait]
        self._turn = 0
        self._constant = torch.arange(limits.max_rows + 1, device=device)
        self.clear()

    def batch(self, rows: int) -> Batch:
        """Return the batch of `rows` rows that lies in the device's memory, whatever that holds when it is read."""
        fields, limits = self._device, self.limits
        return Batch(
            token_ids=fields.token_ids[:rows],
            positions=fields.positions[:rows],
            slot_mapping=fields.slot_mapping[:rows],
            query_start=self._constant[: rows + 1].to(torch.int32),
            context_lens=fields.context_lens[:rows],
            block_tables=fields.block_tables[:rows],
            logits_indices=self._constant[:rows],
            num_decodes=rows,
            query_lens_cpu=(1,) * rows,
            context_lens_cpu=(limits.max_context,) * rows,
            lora=None,
        )

    def clear(self) -> None:
        """Make every row padding."""
        self._send(self._next(), 0, self.limits.max_rows)

    def load(self, batch: Batch, rows: int) -> None:
        """Copy the rows of `batch`, one token each and on the host; rows from there to `rows` become padding.

        Padding is a token 0 at position 0 of a sequence in the scratch block; all of it writes the same there.

        Raises:
            ValueError: if the batch does not fit.
        """
        live, width = batch.block_tables.shape
        if live > rows or rows > self.limits.max_rows or width > self.limits.max_blocks:
            raise ValueError(f"{live} rows with {width} blocks do not fit in {rows} rows of {self.limits}")
        fields = self._next()
        fields.token_ids[:live] = batch.token_ids
        fields.positions[:live] = batch.positions
        fields.slot_mapping[:live] = batch.slot_mapping
        fields.context_lens[:live] = batch.context_lens
        fields.block_tables[:live, :width] = batch.block_tables
        fields.block_tables[:live, width:] = 0
        self._send(fields, live, rows)

    def _next(self) -> _Fields:
        """Return the host's memory whose turn it is, once its last copy is done."""
        self._turn = 1 - self._turn
        self._copied[self._turn]()
        return self._host[self._turn]

    def _send(self, fields: _Fields, live: int, rows: int) -> None:
        limits = self.limits
        fields.token_ids[live:rows] = 0
        fields.positions[live:rows] = 0
        fields.slot_mapping[live:rows] = limits.scratch_block * limits.block_size
        fields.context_lens[live:rows] = 1
        fields.block_tables[live:rows] = limits.scratch_block
        self._backend.upload(fields.memory, self._device.memory)
        self._copied[self._turn] = self._backend.mark()


def _lay_out(buffer: Buffer, limits: StepLimits) -> tuple[torch.Tensor, ...]:
    """Return token_ids, positions, slot_mapping, context_lens and block_tables in the buffer's memory."""

    def put(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return buffer.put(shape, dtype, lambda: torch.zeros(shape, dtype=dtype))

    rows = limits.max_rows
    wide = [put((rows,), torch.int64) for _ in range(3)]
    return (*wide, put((rows,), torch.int32), put((rows, limits.max_blocks), torch.int32))


def _no_wait() -> None:
    pass
