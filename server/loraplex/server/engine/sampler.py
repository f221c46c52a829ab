"""Chooses the next token of every row of a batch.

Order of what shapes a row's distribution (that of transformers' generate): repetition penalty, frequency and presence
penalty, temperature, top_k, top_p, min_p. Log probabilities are of the model's logits, before all of it.

A row's token depends on its logits, its parameters and (seed, choice, position) alone, never on its neighbours: rows
are worked on one by one, and a draw is a pure function of its counters. The work per sampled row is NumPy over the
vocabulary on the host; greedy rows cost their share of one argmax on the logits' device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from loraplex.server.engine.request import Logprobs, SamplingParams
from loraplex.server.errors import EngineError

FloatRow = NDArray[np.float32]
Ids = NDArray[np.int64]

SampledToken = Logprobs
"""A chosen token. Where the request asked for no log probabilities, `logprob` is NaN: it was not computed."""

# Below this, logits divided by the temperature overflow before the draw could differ from the best token (as in vLLM).
GREEDY_TEMPERATURE = 1e-5

# Tokens summed at once when a draw is located: a running sum over the vocabulary costs six times as much.
_BLOCK = 256


@dataclass(frozen=True)
class SamplingRow:
    """What decides one row's next token, beside its logits. `position` is the index of the token in the output."""

    params: SamplingParams
    seed: int
    choice: int
    position: int
    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int]


class Sampler:
    """Turns logits into tokens; without state, so that a preempted sequence goes on with the same draws."""

    def __call__(self, logits: torch.Tensor, rows: Sequence[SamplingRow]) -> list[SampledToken | EngineError]:
        """Choose one token per row.

        Args:
            logits: (B, V) float32, on any device; not changed.
            rows: B rows.

        Returns:
            B results in the rows' order: the token, or an error where the row's logits are not finite (a single NaN
            or +inf, or nothing above -inf). Equal best logits: the lowest id.
        """
        assert logits.shape[0] == len(rows), f"{logits.shape[0]} rows of logits for {len(rows)} sequences"
        best_ids, best = _best(logits)
        return [
            _sample(logits[i], row, best_ids[i]) if math.isfinite(best[i]) else _not_finite(row)
            for i, row in enumerate(rows)
        ]


def _best(logits: torch.Tensor) -> tuple[list[int], list[float]]:
    """Return each row's first best id and its logit, which is NaN where the row holds any NaN."""
    if logits.device.type != "cpu":
        values, ids = logits.max(dim=-1)
        return ids.tolist(), values.tolist()
    host: NDArray[np.float32] = logits.numpy()
    best = host.argmax(axis=-1)  # ten times as fast as torch's on a CPU
    return best.tolist(), host[np.arange(len(best)), best].tolist()


def _not_finite(row: SamplingRow) -> EngineError:
    return EngineError(f"the model's logits for output token {row.position} are not finite")


def _sample(logits: torch.Tensor, row: SamplingRow, best_id: int) -> SampledToken | EngineError:
    """Choose one row's token; `logits` (V,), whose best token is `best_id`."""
    params = row.params
    greedy, penalized = params.temperature < GREEDY_TEMPERATURE, _is_penalized(params)
    if greedy and not penalized and params.logprobs is None:
        return Logprobs(best_id, math.nan)
    raw: FloatRow = logits.cpu().numpy()
    shaped = penalize(raw, row) if penalized else raw
    token_id = int(shaped.argmax()) if penalized else best_id
    if penalized and not math.isfinite(shaped[token_id]):  # logits near the end of float32's range
        return _not_finite(row)
    if not greedy:
        ids, weights = survivors(shaped, params)
        token_id = int(ids[pick(weights, uniform(row.seed, row.choice, row.position))])
    return Logprobs(token_id, math.nan) if params.logprobs is None else _logprobs(raw, token_id, params.logprobs)


def _is_penalized(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0


def penalize(logits: FloatRow, row: SamplingRow) -> FloatRow:
    """Return a copy of `logits` (V,) with the row's penalties.

    Repetition (CTRL, Keskar et al. 2019) divides positive and multiplies negative logits of tokens in prompt or output.
    Presence and frequency (OpenAI's) are subtracted for tokens in the output, once and per occurrence.
    """
    params, logits = row.params, logits.copy()
    output = np.asarray(row.output_token_ids, dtype=np.int64)
    if params.repetition_penalty != 1:
        seen = np.concatenate((np.asarray(row.prompt_token_ids, dtype=np.int64), output))
        old = logits[seen]  # a token seen twice is written twice, with the same value
        with np.errstate(all="ignore"):
            logits[seen] = np.where(old > 0, old / params.repetition_penalty, old * params.repetition_penalty)
    if len(output):
        ids, counts = np.unique(output, return_counts=True)
        logits[ids] -= params.frequency_penalty * counts + params.presence_penalty
    return logits


def survivors(logits: FloatRow, params: SamplingParams) -> tuple[Ids, FloatRow]:
    """Apply temperature, top_k, top_p and min_p to `logits` (V,), the largest of which is finite.

    Returns:
        The ids (N,) that can be drawn, ascending, and their weights (N,), of which the largest is 1: probabilities
        up to their sum. Where several tokens tie at the border, top_k keeps all and top_p the lowest ids.
    """
    if 0 < params.top_k < len(logits):
        ids = _largest(logits, params.top_k)
        logits = logits[ids]
    else:
        ids = np.arange(len(logits))
    with np.errstate(over="ignore"):
        weights = np.exp((logits - logits.max()) / np.float32(params.temperature))
    if params.top_p < 1:
        kept = _nucleus(weights, params.top_p)
        ids, weights = ids[kept], weights[kept]
    if params.min_p > 0:
        kept = np.flatnonzero(weights >= params.min_p)
        ids, weights = ids[kept], weights[kept]
    return ids, weights


def _largest(values: FloatRow, count: int) -> Ids:
    """Return the ascending indices of the `count` largest values, and of those equal to the smallest of them."""
    border = np.partition(values, len(values) - count)[len(values) - count]
    return np.flatnonzero(values >= border)


def _nucleus(weights: FloatRow, top_p: float) -> Ids:
    """Return the ascending indices of the largest weights that reach the share `top_p` together."""
    total = weights.sum(dtype=np.float64)
    needed = top_p * total
    # Only weights that may be kept are sorted. Any set of largest weights that reaches the share will do; all those
    # below the second floor lie within the remaining 1 - top_p together, so that the rest always reaches it.
    for floor in (1e-4, (1 - top_p) / (2 * len(weights))):
        candidates = np.flatnonzero(weights >= floor * total)
        if weights[candidates].sum(dtype=np.float64) >= needed:
            break
    weights = weights[candidates]
    descending = np.sort(weights)[::-1]  # values alone: ten times as fast as sorting indices
    reached = np.cumsum(descending, dtype=np.float64)
    count = 1 + int(np.searchsorted(reached[:-1], needed))
    border = descending[count - 1]
    kept = weights >= border
    surplus = np.count_nonzero(kept) - count
    if surplus:
        kept[np.flatnonzero(weights == border)[-surplus:]] = False
    nucleus: Ids = candidates[kept]
    return nucleus


def uniform(seed: int, choice: int, position: int) -> float:
    """Return the draw of one output position, within [0, 1): a pure function of its arguments.

    Philox (Salmon et al. 2011) keyed by seed and choice with the position as counter, so that streams of different
    choices or seeds never meet and no state needs to be kept.
    """
    generator = np.random.Philox(key=np.array([seed, choice], dtype=np.uint64), counter=position)
    return (int(generator.random_raw()) >> 11) * 2.0**-53


def pick(weights: FloatRow, draw: float) -> int:
    """Return the index where the running sum of `weights` (N,) passes the share `draw` of the total.

    In vocabulary order: rounding noise in the logits, which can swap two tokens of nearly equal weight in a sorted
    order, moves the borders here by no more than itself. An index of zero weight is never returned.
    """
    sums = np.add.reduceat(weights, np.arange(0, len(weights), _BLOCK), dtype=np.float64)
    ends = np.cumsum(sums)
    target = draw * ends[-1]
    block = _passing(ends, target)
    inside = np.cumsum(weights[block * _BLOCK : (block + 1) * _BLOCK], dtype=np.float64)
    return block * _BLOCK + _passing(inside, target - (ends[block - 1] if block else 0.0))


def _passing(ends: NDArray[np.float64], target: float) -> int:
    """Return the first index whose running sum is above `target`; rounding may have put that at the total itself."""
    return int(np.searchsorted(ends, min(target, np.nextafter(ends[-1], 0)), side="right"))


def _logprobs(logits: FloatRow, token_id: int, top: int) -> SampledToken:
    """Return the token with its log probability and the `top` likeliest tokens, ties by id."""
    shifted = logits - logits.max()
    norm = math.log(np.exp(shifted).sum(dtype=np.float64))
    best: Ids = np.empty(0, dtype=np.int64)
    if top:
        best = _largest(logits, min(top, len(logits)))
        best = best[np.argsort(-logits[best], kind="stable")][:top]
    alternatives = tuple((int(i), float(shifted[i]) - norm) for i in best)
    return Logprobs(token_id, float(shifted[token_id]) - norm, alternatives)
