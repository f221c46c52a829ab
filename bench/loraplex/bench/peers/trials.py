"""The requests of the contest: W16 without and with its adapters, one stream, a long prompt; new ones each round."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from loraplex.bench import w16
from loraplex.bench.peers.contest import Trial
from loraplex.bench.peers.driver import Request
from loraplex.bench.workload import Workload

BASE, MIXED, ONE_STREAM, FIRST_TOKEN = "base", "mixed", "one_stream", "ttft_512"
Tokenize = Callable[[list[str]], list[list[int]]]


@dataclass(frozen=True)
class Sizes:
    """How much is asked; the defaults are W16's and the issue's."""

    rows: int = 16
    tokens: int = 128
    long_prompt: int = 512

    @property
    def context(self) -> int:
        """Tokens that the longest request has, with some room."""
        return self.long_prompt + self.tokens + 64


def make_trials(tokenize: Tokenize, sizes: Sizes, rounds: int) -> dict[str, Trial]:
    """Return the trials by name, with one round more than is counted, for warming up.

    Prompts go to all systems as the same token ids.
    """
    every = range(rounds + 1)
    names = [w16.adapter_name(index) for index in range(sizes.rows)]
    prompts = [_prompts(tokenize, Workload(requests=sizes.rows, seed=seed)) for seed in every]
    # Prompts of their own: an engine that keeps prefixes must not find them from another trial.
    alone = [_prompts(tokenize, Workload(requests=1, seed=seed, series=ONE_STREAM))[0] for seed in every]
    longer = Workload(requests=1, prompt_tokens=sizes.long_prompt + 32, series=FIRST_TOKEN)
    long = [_prompts(tokenize, Workload(**{**vars(longer), "seed": seed}))[0][: sizes.long_prompt] for seed in every]
    return {
        BASE: Trial([[Request(ids, "") for ids in of_round] for of_round in prompts], sizes.tokens),
        MIXED: Trial(
            [[Request(ids, name) for ids, name in zip(of_round, names, strict=True)] for of_round in prompts],
            sizes.tokens,
        ),
        ONE_STREAM: Trial([[Request(ids, names[-1])] for ids in alone], sizes.tokens),
        FIRST_TOKEN: Trial([[Request(ids, "")] for ids in long], 1),
    }


def _prompts(tokenize: Tokenize, workload: Workload) -> Sequence[list[int]]:
    return tokenize([request.prompt for request in workload.plan()])
