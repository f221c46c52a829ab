"""Draws an adapter's spectrum: how the singular values fall off, and where in the model the rank is used."""

from __future__ import annotations

from typing import Any

from loraplex.adapters.training.figure import COLOURS, subplots
from loraplex.adapters.training.module_role import kind_of
from loraplex.adapters.training.spectrum import AdapterSpectrum, ModuleSpectrum


def draw_spectrum(spectrum: AdapterSpectrum) -> Any:
    """Return the figure: singular values by kind of module (median, lowest and highest layer); ranks by layer."""
    kinds = by_kind(spectrum)
    figure, (left, right) = subplots(1, 2, (12, 4.4))
    for number, (kind, modules) in enumerate(kinds.items()):
        colour = COLOURS[number % len(COLOURS)]
        style = "-" if number < len(COLOURS) else "--"
        label = kind.rpartition("N.")[2]
        longest = max(module.rank for module in modules)
        relative = [[value / (module.singular[0] or 1.0) for value in module.singular] for module in modules]
        columns = [sorted(row[index] for row in relative if index < len(row)) for index in range(longest)]
        places = range(1, longest + 1)
        left.plot(places, [column[len(column) // 2] for column in columns], style, color=colour, label=label)
        left.fill_between(places, [c[0] for c in columns], [c[-1] for c in columns], color=colour, alpha=0.12)
        right.plot([module.effective for module in modules], style, color=colour, label=label)
    left.set(xlabel="singular value", ylabel="relative to the largest", yscale="log", title="median over the layers")
    left.set_ylim(bottom=1e-4)
    right.axhline(spectrum.largest_rank, color="black", linestyle=":", linewidth=1)
    right.set(xlabel="layer", ylabel="effective rank", title=f"rank {spectrum.largest_rank} at most", ylim=(0, None))
    for axes in (left, right):
        axes.grid(alpha=0.3)
    left.legend(fontsize=8)
    return figure


def by_kind(spectrum: AdapterSpectrum) -> dict[str, list[ModuleSpectrum]]:
    """Return the modules by their name without the layer's number, in the order of the layers."""
    kinds: dict[str, list[ModuleSpectrum]] = {}
    for module in spectrum.modules:
        kinds.setdefault(kind_of(module.module), []).append(module)
    return kinds
