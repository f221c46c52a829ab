"""Which modules of a model a server could serve adapters on, asked of the server's own table of families."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loraplex.adapters.training.architecture import ModelArchitecture
    from loraplex.adapters.training.mistakes import Servable


def servable_modules(model: ModelArchitecture) -> Servable:
    """Return the modules of `model` that an adapter may target, or why there are none."""
    from loraplex.adapters.training.mistakes import Servable
    from loraplex.server.errors import ModelLoadError
    from loraplex.server.models.families import find_family
    from loraplex.server.models.layout import Layout

    values = model.config.to_dict()
    try:
        family = find_family(values | {"architectures": [model.architecture]})
        layout = Layout(family.read(values), family.names)
    except ModelLoadError as error:
        return Servable(frozenset(), str(error))
    return Servable(layout.module_names)
