"""How much memory a training step needs beside the weights, found out by running it on tensors without contents.

PyTorch's fake tensors go through forward and backward pass of the real model class; each operator says the shape and
type of its result, and autograd keeps what it would keep. Every storage counts from when it appears until it is freed.
So attention, checkpointing and every intermediate result are counted as they are, not by a formula for one family.
Knows nothing about the weights of the base or the optimizer.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Batch:
    """The shape of what goes through the model at once, and how.

    Attributes:
        rows, length: of the batch, in sequences and tokens.
        checkpointing: whether activations are computed again in the backward pass.
        accumulated: whether gradients of an earlier pass are there already.
    """

    rows: int
    length: int
    checkpointing: bool = False
    accumulated: bool = False


@dataclass(frozen=True)
class StepMemory:
    """Bytes beside weights and optimizer: `gradients` when all are there, `activations` on top at the peak."""

    gradients: int
    activations: int


def trace_step(model: Any, batch: Batch) -> StepMemory:
    """Run forward and backward pass of `model` (on the meta device, ready to train) on a batch without contents.

    The loss of a causal language model is TRL's, which makes logits in tiles; the parameters of `model` are replaced.
    """
    causal = model.get_output_embeddings() is not None
    if causal:
        from trl.trainer.utils import add_fused_lm_head

        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        add_fused_lm_head(inner, outputs=("log_probs", "entropy", "is_top1"))
    model.train()
    if batch.checkpointing:
        model.enable_input_require_grads()
        model.activation_checkpointing_enable({"use_reentrant": False})
    with FakeTensorMode():
        _give_contents(model)
        tokens = torch.zeros(batch.rows, batch.length, dtype=torch.long)
        labels = tokens if causal else torch.zeros(batch.rows, dtype=torch.long)
        inputs: dict[str, Any] = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}
        if causal:
            inputs["fused_lm_head"] = True
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        gradients = sum(parameter.nbytes for parameter in trained)
        if batch.accumulated:
            for parameter in trained:
                parameter.grad = torch.empty_like(parameter)
        live = _LiveStorages([*model.parameters(), *model.buffers(), *(p.grad for p in trained), tokens, labels])
        with live:
            model(**inputs).loss.backward()
    kept = gradients if batch.accumulated else 0
    return StepMemory(gradients, max(live.peak + kept - gradients, 0))


def _give_contents(model: Any) -> None:
    """Replace parameters and buffers on the meta device by fake ones on the CPU, whose kernels are those of training.

    On the meta device attention would take the path that keeps a matrix of all pairs of tokens.
    """
    made: dict[int, torch.nn.Parameter] = {}
    originals = []  # keeps the numbers of dead tensors from being used again
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if id(parameter) not in made:
                originals.append(parameter)
                fake = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
                made[id(parameter)] = torch.nn.Parameter(fake, requires_grad=parameter.requires_grad)
            module._parameters[name] = made[id(parameter)]
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")


class _LiveStorages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of storages that operators make while it is on; `peak` is the most at a time."""

    def __init__(self, present: list[torch.Tensor | None]) -> None:
        """Leave the storages of `present` out."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._bytes = 0
        self._sizes: dict[int, tuple[weakref.ref[Any], int]] = {}
        for tensor in present:
            if tensor is not None:
                self._add(tensor, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and count what it made."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf, leaf.untyped_storage().nbytes())
        return result

    def _add(self, tensor: torch.Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._sizes:
            return
        self._sizes[key] = (weakref.ref(storage, lambda _: self._remove(key)), size)
        self._bytes += size
        self.peak = max(self.peak, self._bytes)

    def _remove(self, key: int) -> None:
        self._bytes -= self._sizes.pop(key)[1]
