"""Does this adapter fit this base model? The binding and the report that says why not.

Knows the base model only as names with shapes; knows nothing about how the base is quantized, packed or run.
"""

from __future__ import annotations

from loraplex.adapters.base_model import BaseModel, BaseModule
from loraplex.adapters.bind_report import BindEntry, BindError, BindReport
from loraplex.adapters.bound import BoundAdapter, EmbeddingWeights, ModuleWeights, TokenRows
from loraplex.adapters.formats import Adapter
from loraplex.adapters.linear_binding import LinearBinding
from loraplex.adapters.matrix_binding import MatrixBinding
from loraplex.adapters.naming import find_naming
from loraplex.adapters.target_binding import check_saved, check_targets

__all__ = [
    "BaseModel",
    "BaseModule",
    "BindEntry",
    "BindError",
    "BindReport",
    "BoundAdapter",
    "EmbeddingWeights",
    "ModuleWeights",
    "TokenRows",
    "bind",
    "bind_report",
]


def bind(adapter: Adapter, base: BaseModel) -> BoundAdapter:
    """Give every tensor of `adapter` its place in `base`.

    What counts is that names and shapes fit, and the base's fingerprint where the adapter's config tells it; the base
    that the adapter was trained on may have another name.

    Raises:
        BindError: if any tensor or any declared target has no place.
    """
    bound, report = _bind(adapter, base)
    if report.problems:
        raise BindError(report, f"{base.name} ({base.architecture})")
    return bound


def bind_report(adapter: Adapter, base: BaseModel) -> BindReport:
    """Say for each tensor and each unmatched target of `adapter` where it goes in `base`, or why it cannot."""
    return _bind(adapter, base)[1]


def _bind(adapter: Adapter, base: BaseModel) -> tuple[BoundAdapter, BindReport]:
    naming = find_naming(adapter.pairs, base.modules)
    linear = LinearBinding(adapter, base, naming)
    matrices = MatrixBinding(adapter, base, naming, linear.modules)
    entries = [*linear.entries, *matrices.entries]
    entries += [BindEntry(key, naming.to_base(path)) for key, path in adapter.repeated.items()]
    entries += check_targets(adapter, base, naming) + check_saved(adapter, base, naming)
    trained_on = adapter.spec.base_fingerprint
    if trained_on and base.fingerprint and trained_on != base.fingerprint:
        problem = f"the adapter was trained on another base ({adapter.spec.base_model or trained_on})"
        entries.append(BindEntry("loraplex_base_fingerprint", problem=problem))
    bound = BoundAdapter(
        digest=adapter.digest,
        modules=dict(sorted(linear.modules.items())),
        chat_template=adapter.chat_template,
        embedding=matrices.embedding,
        parameters=matrices.parameters,
        token_rows=matrices.token_rows,
        traits=adapter.traits,
    )
    return bound, BindReport(base.fingerprint, tuple(entries))
