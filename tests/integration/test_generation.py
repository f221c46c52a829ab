"""Generation through the clients: streams against whole answers, choices, log probabilities, stops and seeds."""

from __future__ import annotations

import pytest

from loraplex.client import AsyncClient, Client
from loraplex.client.results import FinishReason
from tests.integration.serving import RunningServer

PROMPT = "The quick brown"
SAMPLED = {"temperature": 1.0, "max_tokens": 16, "ignore_eos": True}


@pytest.mark.parametrize("adapter", ["", "alpha"])
@pytest.mark.parametrize(
    "options",
    [{"max_tokens": 16, "ignore_eos": True}, {**SAMPLED, "seed": 7, "n": 3, "logprobs": 2}],
    ids=["greedy", "three sampled choices"],
)
def test_a_stream_is_the_answer_in_pieces(client: Client, adapter: str, options: dict[str, int]) -> None:
    whole = client.generate(PROMPT, adapter, **options)  # type: ignore[arg-type]
    pieces = list(client.stream(PROMPT, adapter, **options))  # type: ignore[arg-type]
    for choice in whole.choices:
        parts = [part for piece in pieces for part in piece.choices if part.index == choice.index]
        assert "".join(part.text for part in parts) == choice.text
        assert tuple(token for part in parts for token in part.token_ids) == choice.token_ids
        assert [part.finish_reason for part in parts][-1] is choice.finish_reason is FinishReason.LENGTH
        assert all(part.finish_reason is None for part in parts[:-1])
    assert [piece.usage is None for piece in pieces] == [True] * (len(pieces) - 1) + [False]
    assert pieces[-1].usage is not None
    assert pieces[-1].usage.completion_tokens == whole.usage.completion_tokens == 16 * len(whole.choices)
    assert pieces[-1].adapter_digest == whole.adapter_digest
    assert bool(whole.adapter_digest) == bool(adapter)


def test_choices_differ_and_come_in_order(client: Client) -> None:
    answer = client.generate(PROMPT, n=4, seed=1, **SAMPLED)  # type: ignore[arg-type]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert len({choice.token_ids for choice in answer.choices}) > 1


def test_seeds(client: Client) -> None:
    def ids(**options: int) -> tuple[int, ...]:
        return client.generate(PROMPT, **SAMPLED, **options).choices[0].token_ids  # type: ignore[arg-type]

    assert ids(seed=5) == ids(seed=5)
    assert ids(seed=0) == ids(seed=0)
    assert len({ids(seed=seed) for seed in range(4)}) > 1
    assert len({ids() for _ in range(4)}) > 1


def test_logprobs(client: Client) -> None:
    choice = client.generate(PROMPT, max_tokens=5, ignore_eos=True, logprobs=3).choices[0]
    assert len(choice.logprobs) == len(choice.token_ids) == 5
    for token, entry in zip(choice.token_ids, choice.logprobs, strict=True):
        assert entry.chosen.token_id == token == entry.top[0].token_id
        assert len(entry.top) == 3
        assert 0 >= entry.top[0].logprob >= entry.top[1].logprob >= entry.top[2].logprob
    bare = client.generate(PROMPT, max_tokens=5, ignore_eos=True, logprobs=0).choices[0].logprobs
    assert [len(entry.top) for entry in bare] == [0] * 5
    assert not client.generate(PROMPT, max_tokens=5, ignore_eos=True).choices[0].logprobs


def test_stop_strings_and_tokens(client: Client) -> None:
    free = client.generate(PROMPT, max_tokens=20, ignore_eos=True).choices[0]
    stop = free.text[4:6]
    stopped = client.generate(PROMPT, max_tokens=20, ignore_eos=True, stop=[stop]).choices[0]
    assert stopped.text == free.text[: free.text.index(stop)]
    assert stopped.finish_reason is FinishReason.STOP
    token = free.token_ids[3]
    by_token = client.generate(PROMPT, max_tokens=20, ignore_eos=True, stop_token_ids=[token]).choices[0]
    assert by_token.finish_reason is FinishReason.STOP
    assert by_token.token_ids[: free.token_ids.index(token)] == free.token_ids[: free.token_ids.index(token)]


def test_kinds_of_prompts(client: Client) -> None:
    by_text = client.generate(PROMPT, max_tokens=4)
    chat = client.generate([{"role": "user", "content": "hello"}], "alpha", max_tokens=4)
    assert chat.usage.prompt_tokens > 1
    tokens = client.generate([5] * 33, max_tokens=4)
    assert tokens.usage.prompt_tokens == 33
    assert client.generate([5] * 33, max_tokens=4).usage.cached_tokens > 0
    assert client.generate([5] * 33, max_tokens=4, cache_salt="mine").usage.cached_tokens == 0
    assert by_text.choices


def test_scale(client: Client, expected: dict[str, tuple[int, ...]]) -> None:
    def ids(scale: float) -> tuple[int, ...]:
        return client.generate(PROMPT, "alpha", scale, max_tokens=12, ignore_eos=True).choices[0].token_ids

    assert ids(0.0) == expected[""]
    assert ids(1.0) == expected["alpha"]
    assert ids(-1.0) != expected["alpha"]


def test_tokens_are_counted_for_the_adapter(server: RunningServer, client: Client) -> None:
    series = 'generation_tokens_total{adapter="alpha"}'
    before = server.metric(series)
    client.generate(PROMPT, "alpha", max_tokens=9, ignore_eos=True)
    assert server.metric(series) == before + 9


async def test_async_client(server: RunningServer, expected: dict[str, tuple[int, ...]]) -> None:
    async with AsyncClient(server.target, timeout=120) as client:
        answer = await client.generate(PROMPT, "beta", max_tokens=12, ignore_eos=True)
        assert answer.choices[0].token_ids == expected["beta"]
        pieces = [piece async for piece in client.stream(PROMPT, "beta", max_tokens=12, ignore_eos=True)]
        assert "".join(piece.text for piece in pieces) == answer.text
        assert {adapter.name for adapter in await client.list_adapters()} == {"alpha", "beta"}
        assert (await client.server_info()).architecture == "LlamaForCausalLM"
