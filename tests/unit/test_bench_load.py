from __future__ import annotations

import json
from pathlib import Path

import grpc
import numpy as np
import pytest
from safetensors.numpy import load_file

from loraplex.bench.load import WRONG_ADAPTER, load_client, run_load
from loraplex.bench.machine import machine_info
from loraplex.bench.population import Population
from loraplex.bench.random_adapter import ModelShape, write_adapter
from loraplex.bench.server_process import free_ports
from loraplex.bench.workload import Assignment, Workload
from loraplex.client import NotFoundError
from loraplex.v1 import generation_pb2
from tests.unit.fake_server import FakeServer, answer, fail, pieces

IDENTICAL = Assignment.IDENTICAL


async def test_every_request_is_sent_once_and_timed() -> None:
    workload = Workload(concurrency=3, requests=7, max_tokens=5, adapters=("a", "b"), assignment=Assignment.ROUND_ROBIN)
    tokens: list[int] = []
    with FakeServer() as server:
        async with load_client(server.target) as client:
            result = await run_load(client, workload, tokens.append)
        sent = [seen.request for seen in server.seen["GenerateStream"]]
    assert {request.text for request in sent} == {request.prompt for request in workload.plan()}
    assert all(request.sampling.max_tokens == 5 and request.sampling.ignore_eos for request in sent)
    assert all(request.sampling.temperature == 0.0 and request.sampling.HasField("temperature") for request in sent)
    assert [request.index for request in result.requests] == list(range(7))
    assert [request.adapter for request in result.requests] == ["a", "b", "a", "b", "a", "b", "a"]
    for request in result.requests:
        assert request.error == ""
        assert request.text == "Hello wörld"
        assert (request.prompt_tokens, request.output_tokens) == (3, 3)
        assert request.ttft_s is not None
        assert len(request.itl_s) == 2
        assert request.ttft_s + sum(request.itl_s) <= request.e2el_s
    assert sum(tokens) == 21


async def test_a_failure_is_counted_under_its_status_and_not_repeated() -> None:
    with FakeServer() as server:
        server.script["GenerateStream"].append(fail(grpc.StatusCode.UNAVAILABLE, "draining"))
        async with load_client(server.target) as client:
            result = await run_load(client, Workload(concurrency=1, requests=2, adapters=("a",), assignment=IDENTICAL))
        assert len(server.seen["GenerateStream"]) == 2
    assert [request.error for request in result.requests] == ["UNAVAILABLE", ""]


async def test_an_answer_of_another_adapter_is_a_failure() -> None:
    wrong = pieces("x")
    wrong[-1].adapter_digest = "sha256:other"
    with FakeServer() as server:
        server.script["GenerateStream"].append(answer(wrong))
        async with load_client(server.target) as client:
            result = await run_load(client, Workload(requests=1, adapters=("a",), assignment=IDENTICAL))
    assert result.requests[0].error == WRONG_ADAPTER


async def test_a_stream_without_tokens_has_no_first_token() -> None:
    usage = generation_pb2.Usage(prompt_tokens=3)
    with FakeServer() as server:
        server.script["GenerateStream"].append(answer([generation_pb2.GenerateStreamResponse(usage=usage)]))
        async with load_client(server.target) as client:
            result = await run_load(client, Workload(requests=1))
    assert result.requests[0].ttft_s is None
    assert result.requests[0].itl_s == ()


async def test_unknown_adapter_ends_it_before_the_load() -> None:
    with FakeServer() as server:
        server.script["GetAdapter"].append(fail(grpc.StatusCode.NOT_FOUND, "no adapter 'a'"))
        async with load_client(server.target) as client:
            with pytest.raises(NotFoundError, match="no adapter 'a'"):
                await run_load(client, Workload(requests=1, adapters=("a",), assignment=IDENTICAL))
        assert not server.seen["GenerateStream"]


def test_written_adapter_is_as_peft_saves_it(tmp_path: Path) -> None:
    shape = ModelShape(layers=2, hidden=12, intermediate=20, key_value=4)
    write_adapter(tmp_path / "a", rank=3, seed=0, shape=shape)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], len(config["target_modules"])) == (3, 6, 7)
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 7 * 2
    prefix = "base_model.model.model.layers.1"
    assert tensors[f"{prefix}.mlp.down_proj.lora_A.weight"].shape == (3, 20)
    assert tensors[f"{prefix}.self_attn.k_proj.lora_B.weight"].shape == (4, 3)
    assert all(np.isfinite(tensor).all() and tensor.any() for tensor in tensors.values())


def test_a_population_is_of_distinct_adapters_as_peft_saves_them(tmp_path: Path) -> None:
    shape = ModelShape(layers=2, hidden=12, intermediate=20, key_value=4)
    seen: list[int] = []
    population = Population(shape, rank=3, count=4)
    folders = population.write(tmp_path, seen.append)
    assert seen == [1, 2, 3, 4]
    write_adapter(tmp_path / "one", rank=3, seed=0, shape=shape)
    expected = load_file(tmp_path / "one" / "adapter_model.safetensors")
    contents = set()
    for folder in folders:
        tensors = load_file(folder / "adapter_model.safetensors")
        assert {"q_proj", "v_proj"} == {name.split(".")[6] for name in tensors}
        assert all(tensors[name].shape == expected[name].shape for name in tensors)
        assert sum(tensor.size for tensor in tensors.values()) == population.parameters
        assert all(np.isfinite(tensor).all() and tensor.any() for tensor in tensors.values())
        contents.add((folder / "adapter_model.safetensors").read_bytes())
        config = json.loads((folder / "adapter_config.json").read_text())
        assert (config["r"], config["target_modules"]) == (3, ["q_proj", "v_proj"])
    assert len(contents) == 4


def test_machine_info_names_no_machine() -> None:
    text = json.dumps(machine_info())
    assert "cpus" in text
    assert "/" not in text


def test_free_ports_differ() -> None:
    assert len(set(free_ports(5))) == 5
