from __future__ import annotations

import re
from collections import Counter

import pytest

from loraplex.bench.w16 import ADAPTERS, RANKS, workload_of
from loraplex.bench.workload import Assignment, Workload


def test_equal_workloads_plan_equal_requests() -> None:
    workload = Workload(requests=8, adapters=("a", "b"), assignment=Assignment.ROUND_ROBIN, seed=3)
    assert workload.plan() == Workload(**vars(workload)).plan()


def test_another_seed_draws_other_prompts() -> None:
    first, second = Workload(seed=0).plan(), Workload(seed=1).plan()
    assert all(a.prompt != b.prompt for a, b in zip(first, second, strict=True))


def test_no_two_prompts_of_a_run_begin_alike() -> None:
    beginnings = [request.prompt[:15] for request in Workload(requests=200).plan()]
    assert len(set(beginnings)) == 200


@pytest.mark.parametrize("length", [4, 30, 31, 200])
def test_prompts_have_the_length_asked_for(length: int) -> None:
    for request in Workload(prompt_tokens=length).plan():
        assert len(re.findall(r"\w+|[^\w\s]", request.prompt)) == length


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        (Assignment.ROUND_ROBIN, ["a", "b", "", "c", "a"]),
        (Assignment.IDENTICAL, ["a", "a", "a", "a", "a"]),
        (Assignment.BASE, ["", "", "", "", ""]),
    ],
)
def test_assignment_gives_the_adapters_out(assignment: Assignment, expected: list[str]) -> None:
    workload = Workload(requests=5, adapters=("a", "b", "base", "c"), assignment=assignment)
    assert [request.adapter for request in workload.plan()] == expected


def test_distinct_names_no_adapter_twice() -> None:
    workload = Workload(requests=3, adapters=("a", "b", "c", "d"), assignment=Assignment.DISTINCT)
    assert [request.adapter for request in workload.plan()] == ["a", "b", "c"]


def test_zipf_draws_the_kth_adapter_k_times_more_rarely() -> None:
    names = tuple(f"a{number}" for number in range(1, 101))
    plan = Workload(requests=20_000, adapters=names, assignment=Assignment.ZIPF, prompt_tokens=4).plan()
    drawn = Counter(request.adapter for request in plan)
    harmonic = sum(1 / rank for rank in range(1, 101))
    for rank in (1, 2, 3, 5, 10):
        assert drawn[f"a{rank}"] / 20_000 == pytest.approx(1 / rank / harmonic, rel=0.15)
    other = Workload(requests=50, adapters=names, assignment=Assignment.ZIPF, seed=1).plan()
    assert [request.adapter for request in other] != [request.adapter for request in plan[:50]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"concurrency": 0}, "concurrency"),
        ({"requests": 0}, "requests"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"prompt_tokens": 3}, "prompt_tokens"),
        ({"assignment": Assignment.ROUND_ROBIN}, "needs adapters"),
        ({"requests": 3, "adapters": ("a", "a", "b"), "assignment": Assignment.DISTINCT}, "as many adapters"),
    ],
)
def test_impossible_workloads_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Workload(**options)


def test_w16_is_sixteen_requests_at_once_of_128_tokens() -> None:
    for case in ("base", "same", "mixed"):
        workload = workload_of(case)
        assert (workload.concurrency, workload.requests, workload.max_tokens) == (16, 16, 128)
    adapters = [request.adapter for request in workload_of("mixed").plan()]
    assert len(set(adapters)) == ADAPTERS == 16
    assert [int(name.rpartition("r")[2]) for name in adapters] == [*RANKS] * 4
    assert {request.adapter for request in workload_of("same").plan()} == {adapters[-1]}


def test_unknown_case_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown case 'other': choose from base, same, mixed"):
        workload_of("other")


def test_other_series_share_no_prefix_worth_a_cache_block() -> None:
    short = Workload(requests=8, prompt_tokens=128, series="context=128").plan()
    long = Workload(requests=8, prompt_tokens=256, series="context=256").plan()
    for first in short:
        for second in long:
            common = next(
                i for i, (a, b) in enumerate(zip(first.prompt.split(), second.prompt.split(), strict=False)) if a != b
            )
            assert common < 8
