"""What plain Python values become on the wire, and what details become in errors."""

from __future__ import annotations

import pickle
import subprocess
import sys
from dataclasses import fields
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf import any_pb2
from google.rpc import error_details_pb2

from loraplex.client import (
    ChatMessage,
    Choice,
    ErrorDetails,
    FieldViolation,
    GenerationPiece,
    InvalidRequestError,
    PreconditionError,
    Prompt,
    SamplingOptions,
    TokenLogprob,
    TokenLogprobs,
    Usage,
)
from loraplex.client.channel import ChannelOptions
from loraplex.client.errors import error_from_rpc, parse_details
from loraplex.client.merge_requests import merge_adapter
from loraplex.client.options import SamplingKeywords, combine
from loraplex.client.requests import generate_request
from loraplex.client.responses import GenerationBuilder, generation
from loraplex.v1 import export_pb2, generation_pb2


def request_of(prompt: Prompt = "hi", sampling: SamplingOptions | None = None) -> generation_pb2.GenerateRequest:
    return generate_request(prompt, "", None, sampling or SamplingOptions(), "")


class Failed(grpc.RpcError):
    """A failed call with given trailers."""

    def __init__(self, code: grpc.StatusCode, message: str | None, *trailers: tuple[str, Any]) -> None:
        self._answer = (code, message, trailers)

    def code(self) -> grpc.StatusCode:
        return self._answer[0]

    def details(self) -> str | None:
        return self._answer[1]

    def trailing_metadata(self) -> Any:
        return self._answer[2] or None


def test_unset_is_not_zero() -> None:
    assert request_of().sampling.ListFields() == []
    zeros = SamplingOptions(max_tokens=0, temperature=0.0, top_k=0, seed=0, logprobs=0, ignore_eos=False)
    sampling = request_of(sampling=zeros).sampling
    assert {field.name for field, _ in sampling.ListFields()} == {
        "max_tokens",
        "temperature",
        "top_k",
        "seed",
        "logprobs",
        "ignore_eos",
    }


def test_every_option_reaches_its_field() -> None:
    values: dict[str, Any] = {
        option.name: {"stop": ("a", "b"), "stop_token_ids": (1, 2), "ignore_eos": True}.get(option.name, number)
        for number, option in enumerate(fields(SamplingOptions), start=1)
    }
    sampling = request_of(sampling=SamplingOptions(**values)).sampling
    sent = {name: getattr(sampling, name) for name in values}
    assert {name: tuple(value) if name.startswith("stop") else value for name, value in sent.items()} == values
    assert set(values) == {field.name for field in sampling.DESCRIPTOR.fields}


def test_keywords_are_the_options() -> None:
    assert SamplingKeywords.__annotations__.keys() == {option.name for option in fields(SamplingOptions)}
    assert combine(SamplingOptions(top_k=1, n=2), n=3) == SamplingOptions(top_k=1, n=3)
    with pytest.raises(TypeError, match="sequence of strings"):
        combine(None, stop="ab")


def test_prompts() -> None:
    assert request_of("hi").text == "hi"
    assert request_of("").WhichOneof("prompt") == "text"
    messages: list[Prompt] = [[ChatMessage("user", "hi")], [{"role": "user", "content": "hi"}]]
    for prompt in messages:
        (message,) = request_of(prompt).chat.messages
        assert (message.role, message.content) == ("user", "hi")
    assert list(request_of([1, 2]).tokens.token_ids) == [1, 2]
    assert list(request_of(list(np.array([1, 2]))).tokens.token_ids) == [1, 2]
    assert request_of([]).WhichOneof("prompt") == "tokens"


@pytest.mark.parametrize(
    "prompt", [5, {1, 2}, ["hi"], [1, ChatMessage("user", "hi")], [{"role": "user"}], [1.5], [None]]
)
def test_what_is_no_prompt_is_a_type_error(prompt: Any) -> None:
    with pytest.raises(TypeError):
        request_of(prompt)


@pytest.mark.parametrize("prompt", [[-1], [2**32], "\ud800"])
def test_what_fits_no_field_names_the_prompt(prompt: Any) -> None:
    with pytest.raises(InvalidRequestError, match="prompt: ") as caught:
        request_of(prompt)
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT


def test_request_ids_are_made_where_none_is_given() -> None:
    assert request_of().request_id != request_of().request_id


def test_merge_bases_are_taken_by_name() -> None:
    assert merge_adapter("a", "o", base="dequantized").request.base == export_pb2.MERGE_BASE_DEQUANTIZED
    with pytest.raises(InvalidRequestError, match="base"):
        merge_adapter("a", "o", base="half")
    assert merge_adapter("a", "o", method="ties").request.method == export_pb2.MERGE_METHOD_TIES
    with pytest.raises(InvalidRequestError, match="method"):
        merge_adapter("a", "o", method="soup")
    with pytest.raises(InvalidRequestError, match="seed"):
        merge_adapter({"a": 0.5, "b": 0.5}, "o", seed=-1)
    with pytest.raises(TypeError, match="fast"):
        merge_adapter("a", "o", fast=True)  # type: ignore[call-arg]


def test_logprobs_are_read() -> None:
    token = generation_pb2.TokenLogprob(token_id=3, logprob=-0.5)
    positions = [generation_pb2.TokenLogprobs(chosen=token, top=[token])]
    choice = generation_pb2.Choice(text="a", logprobs=positions)
    (read,) = generation(generation_pb2.GenerateResponse(choices=[choice])).choices
    assert read.logprobs == (TokenLogprobs(TokenLogprob(3, -0.5), (TokenLogprob(3, -0.5),)),)
    assert read.finish_reason is None


def test_choices_that_come_interleaved_are_told_apart() -> None:
    builder = GenerationBuilder("r")
    builder.add(GenerationPiece("", (Choice(1, "x"), Choice(0, "a"))))
    builder.add(GenerationPiece("", (Choice(0, "b"),)))
    piece = GenerationPiece("", (Choice(1, "y"), Choice(1, "z")), Usage(1, 5))
    assert builder.add(piece).text == ""
    built = builder.build()
    assert [(choice.index, choice.text) for choice in built.choices] == [(0, "ab"), (1, "xyz")]
    assert (built.request_id, built.text) == ("r", "ab")


def packed(*messages: Any) -> list[any_pb2.Any]:
    details = []
    for message in messages:
        detail = any_pb2.Any()
        detail.Pack(message)
        details.append(detail)
    return details


def test_details_are_read_whatever_their_order() -> None:
    failure = error_details_pb2.PreconditionFailure()
    failure.violations.add(type="STATE", subject="exports", description="are off")
    info = error_details_pb2.ErrorInfo(reason="OFF", domain="loraplex", metadata={"violation_count": "9"})
    foreign = error_details_pb2.ErrorInfo(reason="PROXY", domain="elsewhere", metadata={"report_id": "no"})
    expected = ErrorDetails((FieldViolation("exports", "are off"),), 9, "", None, "OFF")
    assert parse_details(packed(failure, info, foreign)) == expected
    assert parse_details(packed(foreign, error_details_pb2.Help(), info, failure)) == expected


@pytest.mark.parametrize("trailer", [b"\xff\xff\xff", b"", b"\x08\x05\x12\x05other"])
def test_details_that_cannot_be_read_leave_code_and_message(trailer: bytes) -> None:
    error = error_from_rpc(Failed(grpc.StatusCode.NOT_FOUND, "no a", ("grpc-status-details-bin", trailer)), "sent")
    assert (str(error), error.code, error.request_id) == ("no a", grpc.StatusCode.NOT_FOUND, "sent")
    assert error.details == ErrorDetails()


def test_a_failure_without_message_or_trailers_says_its_code() -> None:
    assert str(error_from_rpc(Failed(grpc.StatusCode.PERMISSION_DENIED, None))) == "permission denied"


def test_errors_cross_processes() -> None:
    details = ErrorDetails((FieldViolation("a", "b"),), 3, "rep")
    error = pickle.loads(pickle.dumps(PreconditionError("m", request_id="r", details=details)))
    assert (type(error), str(error), error.request_id, error.report_id) == (PreconditionError, "m", "r", "rep")


def test_only_this_machine_is_reached_without_a_proxy() -> None:
    options = ChannelOptions()
    for target in ("localhost:1", "127.0.0.1:1", "[::1]:1", "unix:/tmp/x"):
        assert ("grpc.enable_http_proxy", 0) in options.for_target(target)
    assert "grpc.enable_http_proxy" not in dict(options.for_target("gpu-1:50051"))


def test_the_client_needs_neither_server_nor_adapters() -> None:
    script = "import sys, loraplex.client; print(*[m for m in sys.modules if m.startswith('loraplex.')])"
    result = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, timeout=60)
    assert {name.split(".")[1] for name in result.stdout.split()} == {"client", "v1"}
