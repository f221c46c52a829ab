"""Does what an adapter's config says was trained agree with the tensors that were saved, on this base model?

A module that is named but has no tensors was lost, and PEFT would start it anew; tensors of a module that is not named
would be left out by PEFT. Both are reported.
"""

from __future__ import annotations

from collections.abc import Iterable

from loraplex.adapters.base_model import HEAD_WEIGHT, BaseModel
from loraplex.adapters.bind_report import BindEntry
from loraplex.adapters.formats import Adapter
from loraplex.adapters.fusion import in_layout_of
from loraplex.adapters.naming import Naming
from loraplex.adapters.spec import ALL_LINEAR


def check_targets(adapter: Adapter, base: BaseModel, naming: Naming) -> list[BindEntry]:
    """Return the disagreements about LoRA: targets without tensors, and tensors without a target."""
    spec = adapter.spec
    adapted = {*adapter.pairs, *adapter.embeddings}
    layout = in_layout_of(map(naming.to_base, adapter.pairs), base.modules)
    linear = {naming.to_source(module) for module in layout}
    embedding = naming.to_source(base.embedding.removesuffix(".weight"))
    wanted = {module for module in linear if spec.targets(module)}
    if embedding and spec.targets(embedding, embedding=True):
        wanted.add(embedding)
    entries = []
    for module in sorted(adapted & {*linear, embedding} - wanted):
        tied = module == naming.head and base.tied and spec.ensure_weight_tying
        if spec.excludes(module) or (spec.target_modules is not None and not tied):
            pair = adapter.pairs.get(module) or adapter.embeddings[module]
            problem = "belongs to a module that the config does not target, so that PEFT would leave it out"
            entries.append(BindEntry(pair.a_key, naming.to_base(module), problem=problem))
    without = _names_without(adapter, {*linear, embedding}, adapted)
    problem = "is named in target_modules, but no tensor belongs to it; train it or take it out of the list"
    entries += [BindEntry(name, problem=problem) for name in without]
    if without and not isinstance(spec.target_modules, str):
        named = tuple(f".{name}" for name in without)
        wanted = {module for module in wanted if not f".{module}".endswith(named)}
    problem = "is a target by the config, but no tensor belongs to it"
    return [*entries, *(BindEntry(module, problem=problem) for module in sorted(wanted - adapted))]


def _names_without(adapter: Adapter, modules: Iterable[str], adapted: Iterable[str]) -> tuple[str, ...]:
    """Return the entries of `target_modules` that no adapted module answers to, though not every one is excluded."""
    spec = adapter.spec
    modules, adapted = tuple(modules), tuple(adapted)
    if isinstance(spec.target_modules, str):
        is_expression = spec.target_modules.lower() != ALL_LINEAR
        return (spec.target_modules,) if is_expression and not any(map(spec.targets, adapted)) else ()
    without = []
    for name in spec.target_modules or ():
        if not any(module == name or module.endswith(f".{name}") for module in adapted):
            meant = [module for module in modules if module == name or module.endswith(f".{name}")]
            if not meant or not all(map(spec.excludes, meant)):
                without.append(name)
    return tuple(without)


def check_saved(adapter: Adapter, base: BaseModel, naming: Naming) -> list[BindEntry]:
    """Return the parameters that `modules_to_save` and `bias` say were trained, but that are not there."""
    spec = adapter.spec
    weights = [f"{module}.weight" for module in base.modules]
    present = {naming.to_base(path) for path in adapter.parameters}
    if base.tied and spec.ensure_weight_tying and present & {base.embedding, HEAD_WEIGHT}:
        present |= {base.embedding, HEAD_WEIGHT}
    missing: dict[str, str] = {}
    met: set[str] = set()
    for parameter in (*base.parameters, *weights):
        names = spec.saving_names(naming.to_source(parameter))
        met.update(names)
        if names and parameter not in present:
            missing[parameter] = f"was trained according to modules_to_save ({names[0]}), but it is not in the file"
    for parameter in base.parameters:
        module, _, kind = parameter.rpartition(".")
        with_lora = naming.to_source(module) in adapter.pairs
        wanted = spec.bias == "all" or (spec.bias == "lora_only" and with_lora)
        if kind == "bias" and wanted and parameter not in present:
            missing[parameter] = f"was trained according to bias ({spec.bias!r}), but it is not in the file"
    unknown = [name for name in spec.modules_to_save if name not in met]
    problem = "is named in modules_to_save, but the base has no such module"
    return [
        *(BindEntry(name, problem=problem) for name in unknown),
        *(BindEntry(parameter, problem=reason) for parameter, reason in missing.items()),
    ]
