"""Distributions against transformers' processors, draws against expectation, and rows that mind only their own."""

import math
from collections import Counter
from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from loraplex.server.engine.request import Logprobs, SamplingParams
from loraplex.server.engine.sampler import Sampler, SamplingRow, penalize, pick, survivors, uniform
from loraplex.server.errors import EngineError

VOCAB = 1000
# Critical values of chi-square at 0.999: the chance that a right sampler fails is 1 in 1000 for a fresh seed, and
# none for the fixed seeds here.
CHI_SQUARE_7, CHI_SQUARE_15 = 24.32, 37.70


def make_logits(rows: int = 1, vocab: int = VOCAB, seed: int = 0, spread: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread


def row(
    params: SamplingParams,
    *,
    seed: int = 1,
    choice: int = 0,
    position: int = 0,
    prompt: tuple[int, ...] = (),
    output: tuple[int, ...] = (),
) -> SamplingRow:
    return SamplingRow(params, seed, choice, position, prompt, output)


def sample(logits: torch.Tensor, *rows: SamplingRow) -> list[int]:
    results = Sampler()(logits, rows)
    assert all(isinstance(result, Logprobs) for result in results)
    return [result.token_id for result in results if not isinstance(result, EngineError)]


def reference_probs(logits: torch.Tensor, params: SamplingParams, seen: tuple[int, ...] = ()) -> torch.Tensor:
    """What transformers' generate would draw from; (V,)."""
    processors = LogitsProcessorList()
    if params.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    processors.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        processors.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        processors.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        processors.append(MinPLogitsWarper(params.min_p))
    scores = processors(torch.tensor([seen]), logits[None].double())  # type: ignore[arg-type]
    return scores.softmax(-1)[0]


def our_probs(logits: torch.Tensor, sampling_row: SamplingRow) -> torch.Tensor:
    ids, weights = survivors(penalize(logits.numpy(), sampling_row), sampling_row.params)
    assert all(a < b for a, b in pairwise(ids.tolist()))
    probs = torch.zeros(len(logits), dtype=torch.double)
    probs[torch.from_numpy(ids)] = torch.from_numpy(weights.astype(np.float64) / weights.sum(dtype=np.float64))
    return probs


@pytest.mark.parametrize(
    ("top_k", "top_p", "spread"),
    # Peaked, and so flat that no small set of tokens reaches top_p.
    list(product((0, 1, 40, VOCAB + 5), (1.0, 0.9, 0.3, 1e-6, 0.9999), (3.0, 0.3))),
)
def test_the_distribution_is_that_of_transformers(top_k, top_p, spread):
    logits = make_logits(spread=spread)[0]
    prompt, output = (5, 6, 7, 7), (int(logits.argmax()), 9, 9)
    for temperature, min_p, penalty in product((0.3, 1.0, 2.5), (0.0, 0.05, 1.0), (1.0, 1.3, 0.8)):
        params = SamplingParams(
            temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=penalty
        )
        expected = reference_probs(logits, params, prompt + output)
        actual = our_probs(logits, row(params, prompt=prompt, output=output))
        assert torch.equal(actual > 0, expected > 0)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-12)


def test_ties_at_the_border_of_top_k_all_survive_as_in_transformers():
    logits = torch.tensor([1.0, 3.0, 1.0, 0.0, 1.0])
    params = SamplingParams(temperature=1.0, top_k=2)
    torch.testing.assert_close(our_probs(logits, row(params)), reference_probs(logits, params))


def test_ties_at_the_border_of_top_p_go_to_the_lowest_ids():
    logits = torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0]).repeat_interleave(100)
    weight = 100 * math.e / (100 * math.e + 400)
    params = SamplingParams(temperature=1.0, top_p=weight + (1 - weight) * 0.2501)
    ids, _ = survivors(logits.numpy(), params)
    assert ids.tolist() == list(range(201))


def test_presence_and_frequency_penalties_count_the_output_only():
    logits = make_logits()[0].numpy()
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    penalized = penalize(logits, row(params, prompt=(1, 2, 3), output=(3, 4, 4, 4)))
    expected = logits.copy()
    expected[3] -= 0.5 + 0.25
    expected[4] -= 0.5 + 3 * 0.25
    np.testing.assert_allclose(penalized, expected, rtol=1e-6)


def test_penalties_come_before_greedy_choice_too():
    logits = torch.tensor([[2.0, 1.9, -1.0]])
    assert sample(logits, row(SamplingParams())) == [0]
    assert sample(logits, row(SamplingParams(repetition_penalty=1.2), prompt=(0,))) == [1]
    assert sample(logits, row(SamplingParams(presence_penalty=0.5), output=(0,))) == [1]
    assert sample(logits, row(SamplingParams(presence_penalty=0.5), prompt=(0,))) == [0]
    assert logits.tolist() == [[2.0, pytest.approx(1.9), -1.0]], "the logits were changed"


def test_greedy_takes_the_best_token_and_the_lowest_id_of_equals():
    logits = torch.tensor([[0.0, 5.0, 5.0, 1.0], [7.0, 7.0, 7.0, 7.0], [-math.inf, -math.inf, 0.0, -math.inf]])
    assert sample(logits, *[row(SamplingParams())] * 3) == [1, 0, 2]
    assert sample(logits, *[row(SamplingParams(temperature=1e-9))] * 3) == [1, 0, 2]


def test_logprobs_are_those_of_the_raw_logits():
    logits = make_logits(rows=2)
    expected = logits.double().log_softmax(-1)
    plain = SamplingParams(logprobs=3)
    shaped = SamplingParams(
        logprobs=3, temperature=0.1, top_k=1, repetition_penalty=5.0, presence_penalty=1.0, frequency_penalty=1.0
    )
    best = int(logits[1].argmax())
    for result, index in zip(Sampler()(logits, [row(plain), row(shaped, output=(best,))]), range(2), strict=True):
        assert isinstance(result, Logprobs)
        assert result.logprob == pytest.approx(float(expected[index, result.token_id]), abs=1e-5)
        values, ids = expected[index].topk(3)
        assert [token_id for token_id, _ in result.top] == ids.tolist()
        assert [logprob for _, logprob in result.top] == pytest.approx(values.tolist(), abs=1e-5)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_alternatives_and_no_logprobs(temperature):
    logits = make_logits()
    (none,) = Sampler()(logits, [row(SamplingParams(temperature=temperature, logprobs=0))])
    (off,) = Sampler()(logits, [row(SamplingParams(temperature=temperature))])
    assert isinstance(none, Logprobs)
    assert isinstance(off, Logprobs)
    assert none.top == off.top == ()
    assert none.token_id == off.token_id
    assert math.isfinite(none.logprob)
    assert math.isnan(off.logprob)


def test_alternatives_of_equal_probability_are_ordered_by_id():
    (result,) = Sampler()(torch.zeros(1, 8), [row(SamplingParams(logprobs=3))])
    assert isinstance(result, Logprobs)
    assert [token_id for token_id, _ in result.top] == [0, 1, 2]
    assert [logprob for _, logprob in result.top] == pytest.approx([-math.log(8)] * 3)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(temperature=1.0, logprobs=2)])
def test_a_row_that_is_not_finite_fails_alone(bad, params):
    logits = make_logits(rows=3)
    good = Sampler()(logits, [row(params)] * 3)
    logits[1, 700] = bad
    results = Sampler()(logits, [row(params, position=4)] * 3)
    assert isinstance(results[1], EngineError)
    assert "output token 4 are not finite" in str(results[1])
    assert [type(result) for result in results] == [Logprobs, EngineError, Logprobs]
    again = Sampler()(logits, [row(params)] * 3)
    assert repr([again[0], again[2]]) == repr([good[0], good[2]])


def test_a_row_without_any_token_fails_alone():
    logits = make_logits(rows=2)
    logits[0] = -math.inf
    results = Sampler()(logits, [row(SamplingParams())] * 2)
    assert [type(result) for result in results] == [EngineError, Logprobs]


def test_penalties_that_overflow_fail_the_row():
    logits = torch.full((1, 4), 1e38)
    params = SamplingParams(temperature=1.0, repetition_penalty=0.01)
    (result,) = Sampler()(logits, [row(params, prompt=(2,))])
    assert isinstance(result, EngineError)


def test_masked_tokens_are_never_drawn():
    logits = torch.full((1, 600), -math.inf)
    logits[0, [3, 300, 599]] = torch.tensor([0.0, 1.0, 0.5])
    params = SamplingParams(temperature=1.0)
    assert {sample(logits, row(params, position=p))[0] for p in range(200)} == {3, 300, 599}


def test_extreme_parameters_stay_finite():
    logits = make_logits()
    best = int(logits.argmax())
    for params in (
        SamplingParams(temperature=1e-5),
        SamplingParams(temperature=1.0, top_p=1e-300),
        SamplingParams(temperature=100.0, top_k=1, top_p=0.5, min_p=1.0),
        SamplingParams(temperature=1.0, min_p=1.0),
    ):
        assert sample(logits, row(params)) == [best]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=2.0),
        SamplingParams(temperature=1.0, top_k=5),
        SamplingParams(temperature=1.5, top_p=0.8, min_p=0.05),
    ],
)
def test_draws_follow_the_distribution(params):
    logits = make_logits(vocab=8, seed=3, spread=1.0)
    draws = 8000
    rows = [row(params, seed=99, position=p) for p in range(draws)]
    counts = Counter(sample(logits.expand(draws, -1), *rows))
    probs = reference_probs(logits[0], params)
    assert set(counts) <= set(torch.nonzero(probs).flatten().tolist())
    expected = probs[probs > 0] * draws
    observed = torch.tensor([float(counts[i]) for i in torch.nonzero(probs).flatten().tolist()])
    assert float(((observed - expected) ** 2 / expected).sum()) < CHI_SQUARE_7


@pytest.mark.parametrize("vary", ["position", "choice", "seed"])
def test_uniform_numbers_are_uniform_and_independent_along_every_counter(vary):
    fixed = {"position": 3, "choice": 0, "seed": 2**64 - 1}
    draws = np.array([uniform(**(fixed | {vary: i})) for i in range(8000)])
    assert ((draws >= 0) & (draws < 1)).all()
    for values, cells in ((draws, 16), (draws[:-1:2] * 0.5 + np.floor(draws[1::2] * 2) / 2, 16)):
        counts = np.bincount((values * cells).astype(int), minlength=cells)
        expected = len(values) / cells
        assert ((counts - expected) ** 2 / expected).sum() < CHI_SQUARE_15


def test_the_draw_of_a_position_is_fixed_for_good():
    # A change here changes the text of every seeded request.
    assert uniform(seed=0, choice=0, position=0) == 0.011546754286331562
    assert uniform(seed=42, choice=1, position=7) == 0.8647170113210697


def test_choices_seeds_and_positions_draw_differently():
    logits, params = make_logits(spread=0.1), SamplingParams(temperature=1.0)
    variants = [row(params, seed=s, choice=c, position=p) for s in (1, 2, 3) for c in range(4) for p in range(4)]
    tokens = sample(logits.expand(len(variants), -1), *variants)
    assert len(set(tokens)) > 0.9 * len(tokens)
    assert tokens == sample(logits.expand(len(variants), -1), *variants)


@st.composite
def sampling_rows(draw: st.DrawFn) -> SamplingRow:
    token_ids = st.lists(st.integers(0, VOCAB - 1), max_size=8).map(tuple)
    params = SamplingParams(
        temperature=draw(st.sampled_from([0.0, 0.7, 1.0, 3.0])),
        top_k=draw(st.sampled_from([0, 1, 20])),
        top_p=draw(st.sampled_from([1.0, 0.9, 0.2])),
        min_p=draw(st.sampled_from([0.0, 0.1])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.5])),
        presence_penalty=draw(st.sampled_from([0.0, 1.0])),
        logprobs=draw(st.sampled_from([None, 0, 5])),
    )
    return row(
        params,
        seed=draw(st.integers(0, 2**64 - 1)),
        choice=draw(st.integers(0, 3)),
        position=draw(st.integers(0, 2000)),
        prompt=draw(token_ids),
        output=draw(token_ids),
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(rows=st.lists(sampling_rows(), min_size=1, max_size=6), seed=st.integers(0, 1000), broken=st.booleans())
def test_a_row_gives_the_same_result_alone_and_in_any_batch(rows, seed, broken):
    logits = make_logits(rows=len(rows), seed=seed)
    alone = [Sampler()(logits[i : i + 1], [r])[0] for i, r in enumerate(rows)]
    if broken and len(rows) > 1:
        logits[0, 0] = math.nan
    order = list(reversed(range(len(rows))))
    together = Sampler()(logits[order], [rows[i] for i in order])
    for i, result in zip(order, together, strict=True):
        if i or not broken or len(rows) == 1:
            assert repr(result) == repr(alone[i])


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    weights=st.lists(st.one_of(st.just(0.0), st.floats(0, 1, width=32)), min_size=1, max_size=700).filter(any),
    draw=st.floats(0, 1, exclude_max=True),
)
def test_pick_is_the_inverse_of_the_running_sum(weights, draw):
    array = np.array(weights, dtype=np.float32)
    index = pick(array, draw)
    assert array[index] > 0
    sums = np.cumsum(array, dtype=np.float64)
    before = sums[index - 1] if index else 0.0
    slack = 1e-12 * sums[-1]
    assert before - slack <= draw * sums[-1] <= sums[index] + slack


def test_the_largest_draw_takes_the_last_token_that_has_any_weight():
    array = np.zeros(1000, dtype=np.float32)
    array[[0, 255, 256, 600]] = 0.1
    assert pick(array, 0.0) == 0
    assert pick(array, math.nextafter(1, 0)) == 600


def test_parameters_are_not_shared_between_rows():
    logits, params = make_logits(), SamplingParams(temperature=1.0, top_k=30)
    mixed = [row(params), row(replace(params, temperature=0.0)), row(replace(params, top_k=1))]
    best = int(logits.argmax())
    assert sample(logits.expand(3, -1), *mixed)[1:] == [best, best]
