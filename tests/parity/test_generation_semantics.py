"""On the demo model a request gets what it asks for: seeds, choices, stop strings, log probabilities, chats."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from loraplex.adapters.binding import BoundAdapter
from loraplex.server.config import EngineConfig
from loraplex.server.engine.request import FinishReason, GenerationRequest, SamplingParams
from loraplex.server.models.loader import LoadedModel, load_model
from loraplex.server.tokenizer import Tokenizer
from tests.parity.engine_runs import EngineRun, running_engine

pytestmark = pytest.mark.slow

PROMPT = "Once upon a time there was a"
CONFIG = EngineConfig(kv_cache_memory=64 * 2**20, max_model_len=256)


@pytest.fixture(scope="module")
def tokenizer(demo_path: Path) -> Tokenizer:
    return Tokenizer.load(demo_path)


@pytest.fixture(scope="module")
def model(demo_path: Path) -> LoadedModel:
    return load_model(str(demo_path), dtype="float32")


@pytest.fixture
def run(model: LoadedModel, tokenizer: Tokenizer) -> Iterator[EngineRun]:
    """An engine of its own for each test."""
    adapters: dict[str, BoundAdapter] = {}
    with running_engine(model, tokenizer, CONFIG, adapters.__getitem__) as running:
        yield running


@pytest.fixture
def prompt(tokenizer: Tokenizer) -> tuple[int, ...]:
    return tuple(tokenizer.encode(PROMPT))


def request(name: str, prompt: tuple[int, ...], **params: Any) -> GenerationRequest:
    return GenerationRequest(name, prompt, SamplingParams(**{"max_tokens": 16, "seed": 7, "ignore_eos": True} | params))


def test_a_seed_gives_the_same_tokens_alone_and_in_a_crowd(
    run: EngineRun, tokenizer: Tokenizer, prompt: tuple[int, ...]
) -> None:
    sampled = {
        "plain": {"temperature": 1.0, "seed": 11},
        "nucleus": {"temperature": 0.8, "top_p": 0.9, "seed": 12},
        "penalized": {"temperature": 0.7, "top_k": 50, "repetition_penalty": 1.2, "seed": 13},
    }
    for name, params in sampled.items():
        run.finish(request(f"{name} alone", prompt, **params))
    crowd = [
        request(f"crowd {i}", tuple(tokenizer.encode(f"{i} is the number of")), temperature=i % 2 * 0.9)
        for i in range(6)
    ]
    run.finish(*crowd, *(request(name, prompt, **params) for name, params in sampled.items()))
    assert max(step.num_rows for step in run.recorder.steps) == len(crowd) + len(sampled)
    for name in sampled:
        assert run.outputs.tokens(name) == run.outputs.tokens(f"{name} alone")
        assert len(run.outputs.tokens(name)) == 16
    assert len({tuple(run.outputs.tokens(name)) for name in sampled}) == len(sampled)


def test_sampled_choices_differ_and_greedy_ones_do_not(run: EngineRun, prompt: tuple[int, ...]) -> None:
    run.finish(request("sampled", prompt, n=3, temperature=1.0), request("greedy", prompt, n=2))
    assert len({tuple(run.outputs.tokens("sampled", choice)) for choice in range(3)}) == 3
    assert run.outputs.tokens("greedy", 0) == run.outputs.tokens("greedy", 1)


def test_a_stop_string_ends_the_text_before_itself(run: EngineRun, prompt: tuple[int, ...]) -> None:
    run.finish(request("whole", prompt, max_tokens=40))
    whole = run.outputs.text("whole")
    stop = whole[30:37]  # wherever that is, also in the middle of tokens
    run.finish(request("stopped", prompt, max_tokens=40, stop=(stop, "never in the text")))
    assert run.outputs.text("stopped") == whole[: whole.index(stop)]
    assert run.outputs.finish_reason("stopped") is FinishReason.STOP
    assert run.outputs.finish_reason("whole") is FinishReason.LENGTH


def test_the_text_is_what_the_tokens_say(run: EngineRun, tokenizer: Tokenizer, prompt: tuple[int, ...]) -> None:
    run.finish(request("r", prompt, temperature=1.5, max_tokens=60))
    whole = tokenizer.decode([*prompt, *run.outputs.tokens("r")])
    assert run.outputs.text("r") == whole.removeprefix(tokenizer.decode(prompt))


def test_log_probabilities_are_those_of_transformers(run: EngineRun, demo_path: Path, prompt: tuple[int, ...]) -> None:
    run.finish(request("greedy", prompt, logprobs=5), request("sampled", prompt, logprobs=5, temperature=1.3))
    reference = AutoModelForCausalLM.from_pretrained(demo_path, dtype=torch.float32).eval()
    for name in ("greedy", "sampled"):
        tokens, entries = run.outputs.tokens(name), run.outputs.logprobs(name)
        with torch.inference_mode():
            logits = reference(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1)
        best = expected.topk(5)
        for i, (token, entry) in enumerate(zip(tokens, entries, strict=True)):
            assert entry.token_id == token
            assert entry.logprob == pytest.approx(float(expected[i, token]), abs=1e-3)
            assert [value for _, value in entry.top] == pytest.approx(best.values[i].tolist(), abs=1e-3)
            for other, value in entry.top:
                assert value == pytest.approx(float(expected[i, other]), abs=1e-3)


CHAT = [("system", "You are terse."), ("user", "What is 2 + 2?"), ("assistant", "4"), ("user", "Zażółć 你好?\n")]


@pytest.mark.parametrize("messages", [CHAT, CHAT[1:2], CHAT[1:]])
def test_a_chat_becomes_the_tokens_of_transformers(
    demo_path: Path, tokenizer: Tokenizer, messages: list[tuple[str, str]]
) -> None:
    reference = AutoTokenizer.from_pretrained(demo_path)
    expected = reference.apply_chat_template(
        [{"role": role, "content": content} for role, content in messages],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=False,
    )
    assert tokenizer.apply_chat_template(messages) == expected
