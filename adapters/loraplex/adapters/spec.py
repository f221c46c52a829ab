"""What a LoRA adapter declares about itself: ranks, scalings, targets, and what else was trained.

Follows PEFT's rules for names and patterns (`check_target_module_exists`, `get_pattern_key`, `_set_trainable`). Knows
nothing about files or tensors; module names are those of the model that the adapter was trained on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from loraplex.adapters.base_model import HEAD
from loraplex.adapters.patterns import PatternMatcher
from loraplex.adapters.traits import AdapterTraits

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class AdapterSpec:
    """The declarations of one adapter.

    Patterns keep the config's order, because PEFT takes the first that matches. `target_modules` is a tuple of names,
    a regular expression, or None where the config names none: then the tensors say it. An empty `layers` means all.

    Attributes:
        layers: numbers of the only layers that are targets; the number follows one of `layers_patterns`, if there are
            any.
        bias: "none", "all" or "lora_only": which biases of the base were trained and saved.
        lora_bias: whether B has a bias.
        modules_to_save: ends of the names of modules that were trained whole.
        token_indices: tokens whose rows were trained, in the order of the saved rows: for the module whose name ends in
            the key, or for the input embedding if the key is empty.
        ensure_weight_tying: whether, on a base with tied embeddings, what is trained of one goes for the other.
        base_model: what it was trained on, as its author names it.
        base_fingerprint: the fingerprint of what it was trained on, or empty if that is not said.
    """

    rank: int
    alpha: float
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    target_modules: tuple[str, ...] | str | None = None
    exclude_modules: tuple[str, ...] | str | None = None
    layers: tuple[int, ...] = ()
    layers_patterns: tuple[str, ...] = ()
    bias: str = "none"
    lora_bias: bool = False
    use_dora: bool = False
    modules_to_save: tuple[str, ...] = ()
    token_indices: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    invocation_tokens: tuple[int, ...] = ()
    ensure_weight_tying: bool = False
    base_model: str = ""
    base_fingerprint: str = ""
    _matcher: PatternMatcher = field(default_factory=PatternMatcher, compare=False, repr=False)

    @property
    def traits(self) -> AdapterTraits:
        """How the adapter is to be used."""
        if self.invocation_tokens:
            return AdapterTraits("alora", invocation_tokens=self.invocation_tokens)
        return AdapterTraits("dora", fixed_scale=True) if self.use_dora else AdapterTraits()

    def rank_of(self, module: str) -> int:
        """Return the rank that the config gives `module` (its full path)."""
        return self.rank_pattern.get(self.pattern_key(self.rank_pattern, module), self.rank)

    def scaling_of(self, module: str) -> float:
        """Return what multiplies B A in `module`: alpha / r, or alpha / sqrt(r) for rsLoRA."""
        alpha = self.alpha_pattern.get(self.pattern_key(self.alpha_pattern, module), self.alpha)
        rank = self.rank_of(module)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def pattern_key(self, patterns: Iterable[str], module: str) -> str:
        """Return the first pattern that matches `module` from a dot to its end, or `module` (PEFT's rule)."""
        for pattern in patterns:
            if self._matcher.fully(rf"(.*\.)?({pattern})", module):
                return pattern
        return module

    def targets(self, module: str, *, embedding: bool = False) -> bool:
        """Say whether PEFT would put LoRA on `module`, a linear one or an `embedding`.

        Without `target_modules` nothing is said, and the answer is False.
        """
        if self.excludes(module) or self.target_modules is None:
            return False
        if isinstance(self.target_modules, str):
            if self.target_modules.lower() == ALL_LINEAR:
                return not embedding and module.rpartition(".")[2] != HEAD
            return self._matcher.fully(self.target_modules, module)
        if module in self.target_modules:  # a full name goes for whatever layer it is in
            return True
        return any(module.endswith(f".{name}") for name in self.target_modules) and self._in_layers(module)

    def excludes(self, module: str) -> bool:
        """Say whether `module` is no target by `exclude_modules`, or because it is trained whole."""
        excluded = self.exclude_modules
        if isinstance(excluded, str):
            if excluded and self._matcher.fully(excluded, module):
                return True
        elif any(module == name or module.endswith(f".{name}") for name in excluded or ()):
            return True
        return any(self._matcher.start(rf"(^|.*\.){name}($|\..*)", module) for name in self.modules_to_save)

    def saves(self, parameter: str) -> bool:
        """Say whether `modules_to_save` names a module that `parameter` (its full path) is in."""
        return any(self.saving_names(parameter))

    def saving_names(self, parameter: str) -> tuple[str, ...]:
        """Return the entries of `modules_to_save` whose modules `parameter` is in."""
        parts = parameter.split(".")
        modules = [".".join(parts[:end]) for end in range(1, len(parts))]
        return tuple(name for name in self.modules_to_save if any(module.endswith(name) for module in modules))

    def _in_layers(self, module: str) -> bool:
        if not self.layers:
            return True
        if not self.layers_patterns:
            expressions = [r".*?\.[^.]*\.(?P<idx>\d+)\."]
        else:
            expressions = [rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\." for pattern in self.layers_patterns]
        matches = (self._matcher.start(expression, module) for expression in expressions)
        match = next((match for match in matches if match is not None), None)
        number = match["idx"] if match else None
        return number is not None and int(number) in self.layers
