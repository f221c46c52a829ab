"""Which modules of a model to adapt, and by what names PEFT then finds exactly those.

PEFT takes a name for every module whose path ends in it. A bare `c_proj` is both GPT-2's attention output and its
second feed-forward matrix, a bare `dense` is half of BERT; so names are as short as they can be and as long as they
must be.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from loraplex.adapters.errors import InvalidRequestError
from loraplex.adapters.spec import AdapterSpec
from loraplex.adapters.training.architecture import LinearModule, ModelArchitecture
from loraplex.adapters.training.module_role import ATTENTION_ROLES, FEED_FORWARD_ROLES, kind_of, role_of

Scope = Literal["all", "attention", "feed-forward"]


@dataclass(frozen=True)
class Targets:
    """The modules to adapt, and what to write into `target_modules`: names, or one expression where none will do."""

    modules: tuple[LinearModule, ...]
    target_modules: tuple[str, ...] | str


def choose_targets(model: ModelArchitecture, scope: Scope) -> Targets:
    """Choose all linear modules of the blocks, or those of one part of each block.

    Raises:
        InvalidRequestError: the model has no such modules; says which linear ones it has.
    """
    roles = ATTENTION_ROLES | FEED_FORWARD_ROLES
    if scope != "all":
        roles = ATTENTION_ROLES if scope == "attention" else FEED_FORWARD_ROLES
    chosen = tuple(module for module in model.modules if role_of(module) in roles)
    if not chosen:
        known = ", ".join(sorted({module.leaf for module in model.modules}))
        raise InvalidRequestError.of("target_modules", f"{model.name} has no {scope} modules; its linear ones: {known}")
    return Targets(chosen, names_of(chosen, model.modules))


def names_of(chosen: Sequence[LinearModule], everything: Sequence[LinearModule]) -> tuple[str, ...] | str:
    """Return `target_modules` that hit `chosen` and nothing else of `everything`.

    A name keeps modules of different roles apart where it can. Where no end of a path will do without the layer's
    number, the answer is one regular expression.
    """
    wanted = {module.name for module in chosen}
    names: dict[str, None] = {}
    for kind in _kinds(chosen):
        same_role = {module.name for module in chosen if role_of(module) == role_of(kind[0])}
        name = _shortest_end(kind, everything, same_role.__contains__) or _shortest_end(
            kind, everything, wanted.__contains__
        )
        if name is None:
            return "|".join(expression_of(each) for each in _kinds(chosen))
        names[name] = None
    return tuple(names)


def pattern_of(kind: Sequence[LinearModule], everything: Sequence[LinearModule], alike: Iterable[str]) -> str:
    """Return the key for `rank_pattern` that hits `kind` and, of `everything`, otherwise only modules in `alike`."""
    allowed = {*alike, *(module.name for module in kind)}
    end = _shortest_end(kind, everything, allowed.__contains__)
    return end if end is not None else _end_with_number(kind[0])


def expression_of(kind: Sequence[LinearModule]) -> str:
    """Return an expression that matches the names of one kind of module, whatever the layer."""
    return r"\.".join(r"\d+" if part == "N" else re.escape(part) for part in kind_of(kind[0].name).split("."))


def modules_of(model: ModelArchitecture, target_modules: tuple[str, ...] | str) -> tuple[LinearModule, ...]:
    """Return the linear modules that PEFT would adapt for `target_modules`."""
    spec = AdapterSpec(rank=1, alpha=1.0, target_modules=target_modules)
    modules = model.body if target_modules == "all-linear" else model.modules
    return tuple(module for module in modules if spec.targets(module.name))


def _kinds(modules: Iterable[LinearModule]) -> list[list[LinearModule]]:
    kinds: dict[str, list[LinearModule]] = {}
    for module in modules:
        kinds.setdefault(kind_of(module.name), []).append(module)
    return list(kinds.values())


def _shortest_end(
    kind: Sequence[LinearModule], everything: Sequence[LinearModule], allowed: Callable[[str], bool]
) -> str | None:
    """Return the shortest end of the path, without layer numbers, that hits only what is allowed."""
    parts = kind_of(kind[0].name).split(".")
    for count in range(1, len(parts) + 1):
        end = parts[-count:]
        if end[0] == "N":
            return None
        name = ".".join(end)
        hit = (module.name for module in everything if module.name == name or module.name.endswith(f".{name}"))
        if all(map(allowed, hit)):
            return name
    return None


def _end_with_number(module: LinearModule) -> str:
    """Return the expression for the module's path from the last layer number on."""
    parts = kind_of(module.name).split(".")
    last = len(parts) - 1 - parts[::-1].index("N")
    return r"\.".join((r"\d+", *map(re.escape, parts[last + 1 :])))
