"""One forward pass as a value: which tokens, where their keys and values go, and which adapter each uses.

Built by the runner from the scheduler's decision; read by decoder, attention and LoRA operators; never changed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from loraplex.server.lora.segments import LoraBatch


@dataclass(frozen=True)
class Batch:
    """A ragged batch of B rows with T new tokens in all, decode rows first.

    Shape:
        token_ids, positions, slot_mapping: (T,) int64. `slot_mapping[t]` is block * block_size + offset.
        query_start: (B + 1,) int32, row b's tokens are query_start[b]:query_start[b + 1].
        context_lens: (B,) int32, tokens of row b in the cache after this pass.
        block_tables: (B, max_blocks) int32, unused entries are 0.
        logits_indices: (L,) int64, the tokens whose logits are wanted.
    `num_decodes` rows at the front have exactly one token. All on the CPU for a CPU model, else on the device;
    `query_lens_cpu` and `context_lens_cpu` are always plain numbers. In a step that is captured for replays the tensors
    change from one replay to the next, and `context_lens_cpu` holds the longest contexts that may come: a GPU's code
    sizes its launches by the numbers and computes by the tensors.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    query_start: torch.Tensor
    context_lens: torch.Tensor
    block_tables: torch.Tensor
    logits_indices: torch.Tensor
    num_decodes: int
    query_lens_cpu: tuple[int, ...]
    context_lens_cpu: tuple[int, ...]
    lora: LoraBatch | None

    def to(self, device: torch.device) -> Batch:
        """Return the batch with its tensors on `device`."""
        return replace(
            self,
            token_ids=self.token_ids.to(device),
            positions=self.positions.to(device),
            slot_mapping=self.slot_mapping.to(device),
            query_start=self.query_start.to(device),
            context_lens=self.context_lens.to(device),
            block_tables=self.block_tables.to(device),
            logits_indices=self.logits_indices.to(device),
        )
