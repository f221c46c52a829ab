"""The memory that two training steps really take, measured in a process of its own; what a plan is checked against.

`python -m loraplex.adapters.training.measured_step` reads a job as one JSON object from standard input and writes
`{"bytes": N}`: the peak resident set of the second step (on a GPU: what the allocator gave out), less what the process
held before the model was loaded. The parent makes malloc return what is freed, so that the figure is what was in use
and not what was kept for later.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from loraplex.adapters.errors import PreconditionError, ResourceExhaustedError
from loraplex.adapters.training.measured_process import start_measured
from loraplex.adapters.training.peak_memory import PeakMemory, resident_bytes

_KILLED = 9


def measure_step(values: dict[str, Any], method: str) -> int:
    """Return the bytes that training by `method` (full, lora, qlora) takes; `values` are those of a `TrainConfig`.

    Every token of random rows of `max_length` is learned: the most that such rows can take.

    Raises:
        PreconditionError: the model cannot be loaded or trained.
        ResourceExhaustedError: the memory was not enough.
    """
    job = {"method": method, "config": values}
    with start_measured("loraplex.adapters.training.measured_step", job, stderr=subprocess.PIPE) as child:
        output, errors = child.communicate()
    if child.returncode == -_KILLED:
        raise ResourceExhaustedError(f"measuring {method} took more memory than there is: try fewer or shorter rows")
    if child.returncode:
        raise PreconditionError(f"measuring {method} failed: {errors.strip().splitlines()[-1][:300]}")
    found: int = json.loads(output.splitlines()[-1])["bytes"]
    return found


def main() -> int:
    """Measure what standard input describes; return the exit status."""
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    job = json.load(sys.stdin)
    print(json.dumps({"bytes": _measure(job["config"], job["method"])}), file=out, flush=True)
    return 0


def _measure(values: dict[str, Any], method: str) -> int:
    from trl.trainer.utils import add_fused_lm_head

    from loraplex.adapters.training.frozen_base import load_base, training_device
    from loraplex.adapters.training.lora_model import add_adapter
    from loraplex.adapters.training.train_config import TrainConfig

    config = TrainConfig.from_values(values)
    device = training_device(config)
    before = 0 if device.type == "cuda" else resident_bytes()
    base = load_base(config, device)
    add_fused_lm_head(base, outputs=("log_probs", "entropy", "is_top1"))
    model = base.requires_grad_(True) if method == "full" else add_adapter(base, config, (), Path())
    model.train()
    if config.gradient_checkpointing:
        model.enable_input_require_grads()
        model.activation_checkpointing_enable({"use_reentrant": False})
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate)
    _step(model, optimizer, config, device)  # makes the optimizer's states, and what libraries make once
    peak = PeakMemory(device)
    _step(model, optimizer, config, device)
    return peak.bytes() - before


def _step(model: Any, optimizer: torch.optim.Optimizer, config: Any, device: torch.device) -> None:
    for _ in range(config.gradient_accumulation_steps):
        tokens = torch.randint(0, model.config.vocab_size, (config.per_device_batch_size, config.max_length))
        tokens = tokens.to(device)
        mask = torch.ones_like(tokens)
        model(input_ids=tokens, attention_mask=mask, labels=tokens, fused_lm_head=True).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


if __name__ == "__main__":
    sys.exit(main())
