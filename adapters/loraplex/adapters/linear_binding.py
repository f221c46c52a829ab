"""Gives the LoRA matrices of an adapter their linear modules in a base model, fused or in parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from loraplex.adapters.base_model import BaseModel, BaseModule
from loraplex.adapters.bind_report import BindEntry
from loraplex.adapters.bound import ModuleWeights
from loraplex.adapters.formats import Adapter, LoraPair
from loraplex.adapters.fusion import fused_with, join, parts_of, places, split
from loraplex.adapters.naming import Naming


class LinearBinding:
    """The `modules` that were bound, and what was found on the way."""

    def __init__(self, adapter: Adapter, base: BaseModel, naming: Naming) -> None:
        self.modules: dict[str, ModuleWeights] = {}
        self.entries: list[BindEntry] = []
        self._adapter = adapter
        self._base = base
        groups: dict[str, dict[str, str]] = {}
        for path, pair in sorted(adapter.pairs.items()):
            name = naming.to_base(path)
            parts = [base.modules.get(part) for part in parts_of(name)]
            whole = fused_with(name)
            if name in base.modules:
                self._bind(path, pair, base.modules[name])
            elif parts and None not in parts:
                self._divide(path, pair, [part for part in parts if part is not None])
            elif whole in base.modules:
                groups.setdefault(whole, {})[name] = path
            else:
                self._note(path, pair, "", _no_module(name, base, adapter.spec.base_model))
        for whole, paths in groups.items():
            self._join(base.modules[whole], paths)

    def _bind(self, path: str, pair: LoraPair, module: BaseModule) -> None:
        if self._fits(path, pair, [module]):
            self.modules[module.name] = self._weights(path, pair)

    def _divide(self, path: str, pair: LoraPair, parts: Sequence[BaseModule]) -> None:
        if self._fits(path, pair, parts):
            weights = split(self._weights(path, pair), [part.out_features for part in parts])
            self.modules.update(zip((part.name for part in parts), weights, strict=True))

    def _fits(self, path: str, pair: LoraPair, modules: Sequence[BaseModule]) -> bool:
        """Check the sizes, and note what was found for every tensor and module."""
        trained = self._adapter.spec.base_model
        use = f"use the base it was trained for{f' (it was trained on {trained})' if trained else ''}"
        outputs = sum(module.out_features for module in modules)
        inputs = next((m.in_features for m in modules if m.in_features != pair.a.shape[1]), pair.a.shape[1])
        name = modules[0].name if len(modules) == 1 else f"{modules[0].name} and what stands beside it"
        problems = {
            pair.a_key: ""
            if inputs == pair.a.shape[1]
            else f"has {pair.a.shape[1]} inputs, the base's module has {inputs}; {use}",
            pair.b_key: ""
            if outputs == pair.b.shape[0]
            else f"has {pair.b.shape[0]} outputs, the base's module has {outputs}; {use}",
        }
        if any(problems.values()):
            self._note(path, pair, name, problems)
            return False
        for module in modules:
            self._note(path, pair, module.name, {})
        return True

    def _join(self, whole: BaseModule, paths: Mapping[str, str]) -> None:
        """Bind the adapter's parts of one fused module of the base."""
        problem = self._join_problem(whole, paths)
        pairs = {name: self._adapter.pairs[path] for name, path in paths.items()}
        for name, pair in pairs.items():
            self._note(paths[name], pair, whole.name, problem)
        if problem:
            return
        names = parts_of(whole.name)
        rows = places([pairs[name].b.shape[0] if name in pairs else None for name in names], whole.out_features)
        assert rows is not None
        found = [
            (place, self._weights(paths[name], pairs[name]))
            for place, name in zip(rows, names, strict=True)
            if name in pairs
        ]
        self.modules[whole.name] = join(found, whole.out_features)

    def _join_problem(self, whole: BaseModule, paths: Mapping[str, str]) -> str:
        """Return why parts cannot be put together to the LoRA of `whole`, or nothing."""
        pairs = {name: self._adapter.pairs[path] for name, path in paths.items()}
        fused = f"the base has {whole.name} instead"
        for name, pair in pairs.items():
            if pair.a.shape[1] != whole.in_features:
                return f"{name} has {pair.a.shape[1]} inputs; {fused}, with {whole.in_features}"
        sizes = [pairs[name].b.shape[0] if name in pairs else None for name in parts_of(whole.name)]
        if places(sizes, whole.out_features) is None:
            return f"the parts have {sum(size or 0 for size in sizes)} outputs; {fused}, with {whole.out_features}"
        if len({self._adapter.spec.scaling_of(path) for path in paths.values()}) > 1:
            return f"the parts have scalings of their own; {fused}, which has one"
        if self._adapter.spec.use_dora and None in sizes:
            return f"DoRA on some parts only; {fused}, which has a magnitude for all of its outputs or none"
        return ""

    def _weights(self, path: str, pair: LoraPair) -> ModuleWeights:
        vectors = [None if vector is None else vector.value for vector in (pair.magnitude, pair.bias)]
        return ModuleWeights(pair.a, pair.b, self._adapter.spec.scaling_of(path), *vectors)

    def _note(self, path: str, pair: LoraPair, module: str, problem: str | Mapping[str, str]) -> None:
        rank, scaling = self._adapter.spec.rank_of(path), self._adapter.spec.scaling_of(path)
        for key in (pair.a_key, pair.b_key, *(vector.key for vector in pair.vectors)):
            found = problem if isinstance(problem, str) else problem.get(key, "")
            self.entries.append(BindEntry(key, module, rank, scaling, found))


def _no_module(name: str, base: BaseModel, trained_on: str) -> str:
    kind = name.rpartition(".")[2]
    alike = next((module for module in base.modules if module.rpartition(".")[2] == kind), None)
    hint = f" (its {kind} modules have names like {alike})" if alike else ""
    trained = f"; the adapter was trained on {trained_on}" if trained_on else ""
    return f"the base has no linear module {name}{hint}{trained}"
