"""Reads a merged model again and compares it with base and adapters apart, both in transformers and float32.

Each side computes with one module's weights at a time, so that memory peaks at the largest module in float32 (with a
few copies of it while it is made) and two logits for 512 tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from loraplex.adapters.base_model import HEAD_WEIGHT
from loraplex.adapters.blend import Blend
from loraplex.adapters.compare import Comparison, batches, compare
from loraplex.adapters.errors import PreconditionError
from loraplex.adapters.model_folder import ModelFolder
from loraplex.adapters.streamed_model import StreamedModel
from loraplex.adapters.unmerged import unmerged_model


def check_merged(
    base: ModelFolder,
    blend: Blend,
    quantization: str | None,
    merged: Path,
    prompts: Sequence[Sequence[int]],
    progress: Callable[[int, int], None],
) -> Comparison:
    """Return the difference of the model in the folder `merged` from `base` with `blend` unmerged.

    `quantization` is how the base's weights are rounded, None if they are not; `prompts` are token ids; `progress`
    counts modules computed.

    Raises:
        PreconditionError: the model cannot be read, or transformers does not know it.
    """
    done = total = 0

    def on_module() -> None:
        nonlocal done
        done += 1
        progress(min(done, total), total)

    written = ModelFolder.open(merged)
    after = StreamedModel(merged, _weights(written), on_module)
    before = unmerged_model(base, blend, quantization, on_module)
    total = len(batches(prompts)) * (before.loads + after.loads)
    try:
        return compare(before.logits, after.logits, prompts)
    except KeyError as error:
        raise PreconditionError(f"the merged model cannot be checked: no weight {error} is stored") from error


def _weights(model: ModelFolder) -> Callable[[str], torch.Tensor]:
    def read(name: str) -> torch.Tensor:
        return model.read(model.head_source if name == HEAD_WEIGHT else name)

    return read
