"""What `loraplex adapter verify` does: asks the server, has the answers computed again elsewhere, and judges."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.table import Table

from loraplex.adapters.child import send_job
from loraplex.adapters.errors import InvalidRequestError, PreconditionError
from loraplex.adapters.prompts import tokenize
from loraplex.adapters.verify import PairDifference, ServedAnswer, ServedPosition, Verified, VerifyJob
from loraplex.cli.output import progress_bar
from loraplex.client import AsyncClient, Client, Generation, SamplingOptions, ServerInfo

LOGPROBS = 20
NEIGHBOURS = 3
"""Other adapters that answer the same prompts at the same time, as does the base."""
RESERVE = 512
"""Tokens of a prompt at most; what the server's context leaves for the answer is less."""
GREEDY = SamplingOptions(
    temperature=0.0,
    top_p=1.0,
    top_k=0,
    min_p=0.0,
    repetition_penalty=1.0,
    presence_penalty=0.0,
    frequency_penalty=0.0,
    ignore_eos=True,
    logprobs=LOGPROBS,
    n=1,
)
"""Every field that an adapter's own defaults would fill otherwise; its stop strings and tokens cannot be unset."""


@dataclass(frozen=True)
class Limits:
    """What every pair must keep to: mean KL in nats at most, share of equal best tokens at least."""

    max_mean_kl: float
    min_top1: float

    def hold_for(self, pair: PairDifference) -> bool:
        """Whether `pair` is close enough; NaN is not."""
        return pair.mean_kl <= self.max_mean_kl and pair.top1_agreement >= self.min_top1


@dataclass(frozen=True)
class Verification:
    """What was compared and what came of it.

    `beside` names what else was in the server's batches; `not_merged` says why nothing was merged, if nothing was.
    """

    adapter: str
    digest: str
    model: str
    quantization: str
    prompts: int
    beside: tuple[str, ...]
    pairs: tuple[PairDifference, ...]
    not_merged: str
    max_mean_kl: float
    min_top1: float
    passed: bool


def run(server: str, name: str, model: str, prompts: Sequence[str], max_tokens: int, limits: Limits) -> Verification:
    """Verify the adapter `name` of `server` on `prompts`; `model` is the base's folder or hub id, empty if it says so.

    Raises:
        LoraplexClientError: the server refuses something.
        InvalidRequestError: `max_tokens` leaves no room for a prompt, or the prompts cannot be used.
        LoraplexError: the base model cannot be read here, or the adapter cannot be loaded or merged.
    """
    from loraplex.server.models.source import resolve_model

    with Client(server) as client, tempfile.TemporaryDirectory(prefix="loraplex-verify-") as scratch:
        info, record = client.server_info(), client.get_adapter(name)
        folder = resolve_model(model) if model else _served_folder(info)
        # By its digest, so that nobody exchanges it meanwhile.
        version = f"{record.name}@{record.digest}"
        client.download_adapter(version, Path(scratch) / "adapter")
        others = [other.name for other in client.list_adapters() if other.name != record.name and not other.problem]
        longest = min(RESERVE, info.max_model_len - max_tokens)
        if longest < 1:
            raise InvalidRequestError.of(
                "max_tokens", f"must be less than the server's context of {info.max_model_len}, got {max_tokens}"
            )
        ids = tokenize(folder, prompts, info.vocab_size, longest)
        beside = ("", *others[:NEIGHBOURS])
        answers = asyncio.run(_ask(server, version, beside, ids, max_tokens))
        quantization = None if info.quantization == "none" else info.quantization
        verified = _compare(VerifyJob(folder, Path(scratch) / "adapter", quantization, answers, Path(scratch)))
    return Verification(
        record.name,
        record.digest,
        info.model,
        info.quantization,
        len(ids),
        tuple(each or "the base" for each in beside),
        verified.pairs,
        verified.not_merged,
        limits.max_mean_kl,
        limits.min_top1,
        all(limits.hold_for(pair) for pair in verified.pairs),
    )


def _served_folder(info: ServerInfo) -> Path:
    folder = Path(info.model_path)
    if not info.model_path or not (folder / "config.json").is_file():
        raise PreconditionError(f"the server's model {info.model} is not on this machine: say where it is with --model")
    return folder


async def _ask(
    server: str, version: str, beside: Sequence[str], prompts: Sequence[list[int]], max_tokens: int
) -> tuple[ServedAnswer, ...]:
    """Ask every prompt of `version` and of all others at once; return what `version` answered."""
    async with AsyncClient(server) as client:

        async def ask(adapter: str, prompt: list[int]) -> Generation:
            return await client.generate(prompt, adapter, sampling=replace(GREEDY, max_tokens=max_tokens))

        calls = [ask(adapter, prompt) for prompt in prompts for adapter in (version, *beside)]
        answers = await asyncio.gather(*calls)
    # A stop string or token of its defaults may cut an answer short; the token that ended it is there even so.
    return tuple(_served(prompt, answer) for prompt, answer in zip(prompts, answers[:: len(beside) + 1], strict=True))


def _served(prompt: list[int], answer: Generation) -> ServedAnswer:
    (choice,) = answer.choices
    positions = tuple(
        ServedPosition(token, tuple((each.token_id, each.logprob) for each in position.top))
        for token, position in zip(choice.token_ids, choice.logprobs, strict=True)
    )
    return ServedAnswer(tuple(prompt), positions)


def _compare(job: VerifyJob) -> Verified:
    """Run the reference process on `job`.

    Raises:
        PreconditionError: what it reports, or that it ended without a word.
    """
    # Two threads that give way wait for each other: beside a busy server one is several times as fast.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-m", "loraplex.adapters.verify_process"]
    with (
        progress_bar("loading PEFT") as (bar, task),
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            send_job(process.stdin, job.to_json())
            for line in process.stdout:
                event = json.loads(line)
                if "error" in event:
                    raise PreconditionError(event["error"])
                if "found" in event:
                    return Verified.from_json(event["found"])
                bar.update(task, description=event["phase"], completed=event["done"], total=event["total"])
        except BaseException:
            process.terminate()
            raise
    raise PreconditionError(f"the reference process ended with status {process.returncode} and said nothing")


def table(found: Verification) -> Table:
    """Show the pairs."""
    limits = Limits(found.max_mean_kl, found.min_top1)
    shown = Table(title=f"{found.adapter} on {found.model} ({found.quantization})")
    for column in ("pair", "max difference", "of"):
        shown.add_column(column, no_wrap=True)
    for column in ("top-1", "mean KL", "positions", ""):
        shown.add_column(column, justify="right", no_wrap=True)
    for pair in found.pairs:
        shown.add_row(
            pair.pair,
            f"{pair.max_difference:.3g}",
            pair.measure,
            f"{pair.top1_agreement:.2%}",
            f"{pair.mean_kl:.3g}",
            str(pair.positions),
            "pass" if limits.hold_for(pair) else "FAIL",
        )
    return shown


def describe(found: Verification) -> str:
    """Say what was asked beside what, and the limits."""
    return (
        f"{found.prompts} prompts, answered in batches with {', '.join(found.beside)}; each pair must have a mean KL "
        f"of at most {found.max_mean_kl:g} nats and the same best token at {found.min_top1:.0%} or more. Where the "
        "server takes part, KL is over its best 20 tokens and all others as one"
    )
