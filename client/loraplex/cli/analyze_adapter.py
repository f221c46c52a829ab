"""`loraplex analyze adapter`: the singular values of every module, and how much of its rank it uses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loraplex.cli.connection import JsonOption

if TYPE_CHECKING:
    from loraplex.adapters.training.html_report import ReportTable
    from loraplex.adapters.training.spectrum import AdapterSpectrum, ModuleSpectrum


def analyze_adapter(
    folder: Annotated[Path, typer.Argument(help="The adapter's folder.", exists=True, file_okay=False)],
    output: Annotated[Path | None, typer.Option(help="Write JSON, PNG and an HTML report into this folder.")] = None,
    every: Annotated[bool, typer.Option("--all", help="A row for each module, not for each kind.")] = False,
    compress_to: Annotated[
        Path | None, typer.Option(help="Write the adapter without what it does not use (99 % of the energy kept).")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what each module makes of its rank: effective rank, what 99 % of the update needs, and what is wasted."""
    from loraplex.adapters.training.spectrum import KEPT_ENERGY, read_spectrum
    from loraplex.cli.analysis_output import print_table, write_analysis
    from loraplex.cli.output import print_json

    spectrum = read_spectrum(folder)
    document, table = _document(spectrum), _table(spectrum, every)
    sentences = [_verdict(spectrum)]
    if as_json:
        print_json(document)
    else:
        print_table(table)
        typer.echo(sentences[0])
    if output:
        from loraplex.adapters.training.spectrum_chart import draw_spectrum

        title = f"What {folder.name} makes of its rank"
        tables = [_table(spectrum, False), _table(spectrum, True)]
        write_analysis(output, "adapter", title, sentences, draw_spectrum(spectrum), tables, document)
    if compress_to:
        from loraplex.cli.compress import compress

        compress([str(folder)], compress_to, None, KEPT_ENERGY, None, as_json)
    elif spectrum.size_left < 1 and not as_json:
        typer.echo(f"loraplex adapter compress {folder} --energy {KEPT_ENERGY} --output {folder.name}-compressed")


def _verdict(spectrum: AdapterSpectrum) -> str:
    wasted = 1 - spectrum.needed / spectrum.rank
    worst = max(spectrum.modules, key=lambda module: module.wasted)
    most = f"; most in {worst.module} ({worst.needed} of {worst.rank} needed)" if worst.wasted else ""
    return (
        f"{wasted:.0%} of the rank is not needed for 99 % of each module's update{most}; "
        f"without it {spectrum.size_left:.0%} of the size is left"
    )


def _table(spectrum: AdapterSpectrum, every: bool) -> ReportTable:
    from loraplex.adapters.training.html_report import ReportTable
    from loraplex.adapters.training.spectrum_chart import by_kind

    columns = ("module", "modules", "rank", "effective rank", "needed for 99 %", "wasted", "largest value", "norm")
    groups: dict[str, list[ModuleSpectrum]] = by_kind(spectrum)
    if every:
        groups = {module.module: [module] for module in spectrum.modules}
    title = "Each module" if every else "By kind of module (medians over the layers)"
    return ReportTable(title, columns, [_row(name, modules) for name, modules in groups.items()])


def _row(name: str, modules: Sequence[ModuleSpectrum]) -> tuple[str | float | int, ...]:
    return (
        name,
        len(modules),
        max(module.rank for module in modules),
        float(median(module.effective for module in modules)),
        float(median(module.needed for module in modules)),
        float(median(module.wasted for module in modules)),
        float(median(module.singular[0] for module in modules)),
        float(median(sum(value**2 for value in module.singular) ** 0.5 for module in modules)),
    )


def _document(spectrum: AdapterSpectrum) -> dict[str, Any]:
    return {
        "digest": spectrum.digest,
        "rank": spectrum.rank,
        "needed_rank": spectrum.needed,
        "size_left": spectrum.size_left,
        "modules": [
            {
                "module": module.module,
                "role": module.role,
                "rank": module.rank,
                "effective_rank": module.effective,
                "needed_rank": module.needed,
                "singular_values": module.singular,
            }
            for module in spectrum.modules
        ],
    }
