"""Generation requests that cannot be answered: a clear typed error each, and the server serves on."""

from __future__ import annotations

import math
from typing import Any

import grpc
import pytest

from loraplex.client import Client
from loraplex.client.errors import InvalidRequestError, LoraplexClientError, NotFoundError
from loraplex.v1 import generation_pb2, generation_pb2_grpc
from tests.integration.serving import CONTEXT, RunningServer

OVER_CONTEXT = [5] * CONTEXT
BAD_REQUESTS: dict[str, tuple[Any, dict[str, Any], str, str]] = {
    "empty text": ("", {}, "prompt", "is empty"),
    "no tokens": ([], {}, "prompt", "is empty"),
    "prompt over the context": (OVER_CONTEXT, {}, "prompt", f"has {CONTEXT} tokens; the context holds {CONTEXT}"),
    "token not in the vocabulary": ([999_999], {}, "prompt", "token ids lie within"),
    "unknown chat role": ([{"role": "robot", "content": "x"}], {}, "chat.messages[0].role", "system, user"),
    "max_tokens 0": ("x", {"max_tokens": 0}, "sampling.max_tokens", "at least 1"),
    "max_tokens negative": ("x", {"max_tokens": -5}, "sampling.max_tokens", "at least 1, got -5"),
    "max_tokens huge": ("x", {"max_tokens": 2**31 - 1}, "sampling.max_tokens", "at most"),
    "temperature NaN": ("x", {"temperature": math.nan}, "sampling.temperature", "within 0 and 100"),
    "temperature negative": ("x", {"temperature": -0.1}, "sampling.temperature", "within 0 and 100"),
    "temperature infinite": ("x", {"temperature": math.inf}, "sampling.temperature", "within 0 and 100"),
    "top_p 0": ("x", {"top_p": 0.0}, "sampling.top_p", "above 0"),
    "top_p NaN": ("x", {"top_p": math.nan}, "sampling.top_p", "above 0"),
    "top_k negative": ("x", {"top_k": -1}, "sampling.top_k", "0 (off) or more"),
    "min_p over 1": ("x", {"min_p": 1.5}, "sampling.min_p", "within 0 and 1"),
    "repetition penalty 0": ("x", {"repetition_penalty": 0.0}, "sampling.repetition_penalty", "above 0"),
    "n 0": ("x", {"n": 0}, "sampling.n", "within 1 and"),
    "n huge": ("x", {"n": 10**6}, "sampling.n", "within 1 and"),
    "logprobs over the limit": ("x", {"logprobs": 21}, "sampling.logprobs", "within 0 and 20"),
    "empty stop string": ("x", {"stop": [""]}, "sampling.stop", "empty stop string"),
    "stop token not in the vocabulary": ("x", {"stop_token_ids": [2**32 - 1]}, "sampling.stop_token_ids", "lie within"),
    "scale NaN": ("x", {"adapter": "alpha", "scale": math.nan}, "adapters.scale", "within"),
    "scale infinite": ("x", {"adapter": "alpha", "scale": -math.inf}, "adapters.scale", "within"),
    "request id over-long": ("x", {"request_id": "r" * 129}, "request_id", "at most 128"),
    "request id not ASCII": ("x", {"request_id": "zażółć"}, "request_id", "ASCII"),
    "request id with a line break": ("x", {"request_id": "a\nb"}, "request_id", "ASCII"),
}


def _answer(client: Client, streamed: bool, prompt: Any, **options: Any) -> None:
    if streamed:
        client.stream(prompt, **options).collect()
    else:
        client.generate(prompt, **options)


@pytest.mark.parametrize("streamed", [False, True], ids=["generate", "stream"])
@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_bad_request_names_the_field(client: Client, case: str, streamed: bool) -> None:
    prompt, options, field, advice = BAD_REQUESTS[case]
    with pytest.raises(InvalidRequestError) as raised:
        _answer(client, streamed, prompt, **options)
    error = raised.value
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert error.reason == "INVALID_REQUEST"
    assert any(v.field == field and advice in v.description for v in error.violations), error.violations
    assert advice in str(error)
    assert error.request_id


def test_all_that_is_wrong_is_told_at_once(client: Client) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        client.generate([], temperature=-1.0, top_k=-1, max_tokens=0)
    fields = {violation.field for violation in raised.value.violations}
    assert fields == {"prompt", "sampling.temperature", "sampling.top_k", "sampling.max_tokens"}


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (generation_pb2.GenerateRequest(), "prompt"),
        (
            generation_pb2.GenerateRequest(
                text="x", adapters=[generation_pb2.AdapterSelection(name=n) for n in ("alpha", "beta")]
            ),
            "adapters",
        ),
    ],
    ids=["no prompt", "two adapters"],
)
def test_messages_that_the_client_does_not_make(
    server: RunningServer, request_: generation_pb2.GenerateRequest, field: str
) -> None:
    with grpc.insecure_channel(server.target) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        with pytest.raises(grpc.RpcError) as raised:
            stub.Generate(request_, timeout=20)
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert (raised.value.details() or "").startswith(f"{field}: ")


@pytest.mark.parametrize("name", ["alpah", "alpha@sha256:" + "0" * 64, "base", "../alpha", "a" * 5000])
@pytest.mark.parametrize("streamed", [False, True], ids=["generate", "stream"])
def test_unknown_adapter(client: Client, name: str, streamed: bool) -> None:
    with pytest.raises(NotFoundError) as raised:
        _answer(client, streamed, "x", adapter=name)
    assert raised.value.code is grpc.StatusCode.NOT_FOUND
    assert len(str(raised.value)) <= 1000
    if name == "alpah":
        assert "alpha" in str(raised.value).replace("alpah", "")


def test_adapter_name_that_is_not_ascii(client: Client) -> None:
    with pytest.raises(LoraplexClientError) as raised:
        client.generate("x", "żółć")
    assert raised.value.code in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.INVALID_ARGUMENT)
