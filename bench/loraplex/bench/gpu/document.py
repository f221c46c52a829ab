"""gpu.json and its table: the figures beside targets and model."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from typing import Any

import torch

from loraplex.bench.commit import current_commit
from loraplex.bench.gpu.cards import CARDS, Card
from loraplex.bench.gpu.step_model import DecoderShape, model_document
from loraplex.bench.gpu.targets import TARGETS


def gpu_document(shape: DecoderShape, device: torch.device, measured: Mapping[str, Any]) -> dict[str, Any]:
    """Return the document: one key for each target, what it was measured with, and the model's figures."""
    return {
        "commit": current_commit(),
        "command": "make gpu-bench",
        "device": device_name(device),
        "model": shape.name,
        "versions": {"torch": torch.__version__, "triton": version("triton"), "python": sys.version.split()[0]},
        **measured,
        "modelled": model_document(shape, card_of(device_name(device))),
    }


def device_name(device: torch.device) -> str:
    """Return the card's name; on a CPU, that kernels were interpreted and figures mean nothing."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU, kernels interpreted: no figures"


def card_of(name: str) -> Card:
    """Return the card that a driver's name means; the H100 SXM, which the targets are for, if it is unknown."""
    lower = name.lower()
    if "h100" in lower and "pcie" in lower:
        return CARDS["h100-pcie"]
    return next((card for key, card in CARDS.items() if key in lower.replace("-", " ").split()), CARDS["h100"])


def table(document: Mapping[str, Any]) -> Iterator[str]:
    """Yield the targets as lines of text."""
    yield f"{document['device']}, {document['model']} at {document['commit'] or 'an unknown commit'}"
    yield f"{'':<66}{'target':>12}{'model':>10}{'measured':>10}"
    for target in TARGETS:
        modelled = "-" if target.modelled is None else f"{target.modelled(document['modelled']['steps']):.2f}"
        figure = document.get(target.key)
        shown = "-" if figure is None else f"{figure:.2f}"
        verdict = "" if figure is None or target.met(figure) else "  missed"
        yield f"{target.what:<66}{target.text:>12}{modelled:>10}{shown:>10}{verdict}"
