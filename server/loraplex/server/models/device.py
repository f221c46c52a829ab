"""Which device `--device` names."""

from __future__ import annotations

import torch

from loraplex.server.errors import ModelLoadError


def resolve_device(name: str, num_gpus: int | None = None) -> torch.device:
    """Return the device for "cpu", "cuda" (the first GPU) or "cuda:N"; `num_gpus` None asks torch.

    Raises:
        ModelLoadError: for another name, or a GPU that is not there.
    """
    kind, colon, number = name.partition(":")
    if name == "cpu":
        return torch.device("cpu")
    if kind != "cuda" or (colon and not number.isdecimal()):
        raise ModelLoadError(f"unknown device {name!r}: cpu, cuda or cuda:N")
    found = torch.cuda.device_count() if num_gpus is None else num_gpus
    index = int(number or 0)
    if index >= found:
        seen = f"{found} GPUs, numbered from 0" if found else "no GPU, or this build of torch is for CPUs only"
        raise ModelLoadError(f"--device {name}: torch finds {seen}")
    return torch.device("cuda", index)
