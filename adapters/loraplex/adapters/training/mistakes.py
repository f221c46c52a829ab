"""The mistakes that a training configuration makes most often, each with what to write instead.

The first four are the seed text's; the others are what a server or the data would say later.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from loraplex.adapters.errors import InvalidRequestError
from loraplex.adapters.spec import AdapterSpec
from loraplex.adapters.training.architecture import CLASSIFICATION, ModelArchitecture
from loraplex.adapters.training.data_profile import DataProfile
from loraplex.adapters.training.module_role import ATTENTION_ROLES, FEED_FORWARD_ROLES, role_of
from loraplex.adapters.training.rank_advice import Task, advise_rank, advise_scope
from loraplex.adapters.training.seed_figures import seed
from loraplex.adapters.training.targets import choose_targets, modules_of
from loraplex.adapters.training.train_config import TrainConfig

# Full fine-tuning's usual 1e-5 to 5e-5; a tenth of LoRA's and less.
_FULL_TUNING_RATE = 5e-5
_TOO_FAST = 5e-3
_SHOWN = 4


@dataclass(frozen=True)
class Servable:
    """What a server of the base can serve: `modules` by full name, or none of it for the reason `problem`."""

    modules: frozenset[str]
    problem: str = ""


@dataclass(frozen=True)
class Mistake:
    """What is wrong with a field, and what to write instead."""

    field: str
    problem: str
    instead: str


def find_mistakes(
    config: TrainConfig, model: ModelArchitecture, data: DataProfile | None, task: Task, servable: Servable
) -> tuple[Mistake, ...]:
    """Return the mistakes in `config` for training `task` on `model`, those that cost most first."""
    return (
        *_target_mistakes(config, model, task),
        *_scaling_mistakes(config, model),
        *_rank_mistakes(config, model, task),
        *_rate_mistakes(config),
        *_serving_mistakes(config, model, servable),
        *(_data_mistakes(config, model, data) if data else ()),
    )


def _target_mistakes(config: TrainConfig, model: ModelArchitecture, task: Task) -> Iterator[Mistake]:
    targets = config.target_modules
    good = _good_targets(model, task)
    for name in (targets,) if isinstance(targets, str) else targets:
        hit = modules_of(model, name if isinstance(targets, str) else (name,))
        if not hit:
            yield Mistake("target_modules", f"{name} hits no linear module of this model", good)
            continue
        roles = {role_of(module) for module in hit}
        if not isinstance(targets, str) and roles & ATTENTION_ROLES and roles & FEED_FORWARD_ROLES:
            places = ", ".join(sorted({".".join(module.name.split(".")[-2:]) for module in hit})[:_SHOWN])
            problem = f"a bare {name} is in attention and feed-forward at once ({places})"
            yield Mistake("target_modules", problem, f"qualified names: {good}")
        outside = [module.name for module in hit if role_of(module) == "outside"]
        if outside and name != "all-linear":
            problem = f"{name} also hits {', '.join(outside[:_SHOWN])}, outside of the blocks"
            yield Mistake("target_modules", problem, f"qualified names: {good}")


def _good_targets(model: ModelArchitecture, task: Task) -> str:
    try:
        chosen = choose_targets(model, advise_scope(task)).target_modules
    except InvalidRequestError:
        return "see `loraplex advise`"
    return chosen if isinstance(chosen, str) else ", ".join(chosen)


def _scaling_mistakes(config: TrainConfig, model: ModelArchitecture) -> Iterator[Mistake]:
    factor = seed("alpha_factor")
    if config.lora_alpha < config.rank and not config.use_rslora:
        problem = f"alpha {config.lora_alpha:g} at rank {config.rank} scales the update by {_scale(config):.2g}"
        yield Mistake("alpha", f"{problem}: forgotten when the rank was raised?", f"{factor * config.rank:g}")
    spec = AdapterSpec(
        rank=config.rank,
        alpha=config.lora_alpha,
        rank_pattern=config.rank_pattern,
        alpha_pattern=config.alpha_pattern,
        use_rslora=config.use_rslora,
    )
    off: dict[str, float] = {}
    for module in modules_of(model, config.target_modules):
        scaling, own = spec.scaling_of(module.name), spec.pattern_key(config.rank_pattern, module.name)
        if own in config.rank_pattern and not config.use_rslora and abs(scaling - _scale(config)) > 1e-6:
            off[own] = scaling
    if off:
        listed = ", ".join(f"{name}: {scaling:.3g}" for name, scaling in off.items())
        wanted = ", ".join(f"{name}: {_scale(config) * config.rank_pattern[name]:g}" for name in off)
        problem = f"with ranks of their own these modules are scaled otherwise than the rest ({listed})"
        yield Mistake("alpha_pattern", problem, wanted)


def _scale(config: TrainConfig) -> float:
    return config.lora_alpha / config.rank


def _rank_mistakes(config: TrainConfig, model: ModelArchitecture, task: Task) -> Iterator[Mistake]:
    advice = advise_rank(task, model.parameters)
    if config.rank < advice.lowest:
        problem = f"{config.rank} is below the range for {task} ({advice.lowest} to {advice.highest}) and may underfit"
        yield Mistake("rank", problem, f"{advice.rank}, and more until the held-out score stops rising")
    if config.rank > advice.highest:
        problem = f"{config.rank} is above the range for {task} ({advice.lowest} to {advice.highest})"
        yield Mistake("rank", f"{problem}: more to train and to serve for little", str(advice.rank))
    narrow = [m for m in modules_of(model, config.target_modules) if config.rank > min(m.in_features, m.out_features)]
    if narrow:
        width = min(narrow[0].in_features, narrow[0].out_features)
        problem = f"{config.rank} is more than {narrow[0].leaf}'s own width of {width}"
        yield Mistake("rank", problem, f"a rank_pattern of at most {width} for it")


def _rate_mistakes(config: TrainConfig) -> Iterator[Mistake]:
    if config.learning_rate <= _FULL_TUNING_RATE:
        problem = f"{config.learning_rate:g} is a learning rate of full fine-tuning; A and B hardly move"
        yield Mistake("learning_rate", problem, f"{seed('learning_rate'):g}")
    if config.learning_rate > _TOO_FAST:
        yield Mistake("learning_rate", f"{config.learning_rate:g} diverges", f"{seed('learning_rate'):g}")
    if config.modules_to_save and config.learning_rate > seed("learning_rate") * seed("unfrozen_factor"):
        rate = seed("learning_rate") * seed("unfrozen_factor")
        problem = f"{', '.join(config.modules_to_save)} of the base is trained at LoRA's learning rate"
        yield Mistake("modules_to_save", problem, f"leave it out, or a learning_rate near {rate:g}")


def _serving_mistakes(config: TrainConfig, model: ModelArchitecture, servable: Servable) -> Iterator[Mistake]:
    if config.task == CLASSIFICATION:
        yield Mistake("task", "a classifier writes no text: it can be merged, and the server refuses it", "causal-lm")
        return
    if servable.problem:
        yield Mistake("model", f"the server cannot serve adapters of this model: {servable.problem}", "another base")
        return
    hit = modules_of(model, config.target_modules)
    strange = [module.name for module in hit if module.name not in servable.modules]
    if strange:
        more = f" and {len(strange) - _SHOWN} more" if len(strange) > _SHOWN else ""
        problem = f"the server has no place for LoRA on {', '.join(strange[:_SHOWN])}{more}"
        yield Mistake("target_modules", problem, "leave them out")


def _data_mistakes(config: TrainConfig, model: ModelArchitecture, data: DataProfile) -> Iterator[Mistake]:
    long = data.longer_than(config.max_length)
    if long:
        share = f"{long:,} of {data.rows:,} rows ({long / data.rows:.0%})"
        done = {"refuse": "are refused", "truncate": "lose their end", "skip": "are left out"}[config.long_rows]
        best = min(data.longest, model.max_length)
        yield Mistake("max_length", f"{share} have more than {config.max_length} tokens and {done}", f"{best}")
    if config.max_length > model.max_length:
        problem = f"{config.max_length} is more than the {model.max_length} positions that the model was made for"
        yield Mistake("max_length", problem, str(model.max_length))
