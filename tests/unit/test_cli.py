"""The command, against a scripted server: what it sends, what it writes where, and its exit status."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from typer.testing import CliRunner, Result

from loraplex.adapters.sources import SourcePolicy
from loraplex.cli import connection, serve
from loraplex.cli.main import app
from loraplex.cli.sizes import format_size, parse_size
from loraplex.client import DEFAULT_TARGET
from loraplex.server.config import MIB, EngineConfig, ModelConfig, ServerConfig
from loraplex.v1 import adapter_pb2, export_pb2
from tests.unit.fake_server import DIGEST, FakeServer, answer, error_info, fail, hang, pieces, then_fail

Run = Callable[..., Result]


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as server:
        yield server


@pytest.fixture
def run(server: FakeServer) -> Run:
    """Run the command with its default server set to the fake one."""

    def invoke(*arguments: object, stdin: str | None = None, **environ: str) -> Result:
        environ = {"LORAPLEX_SERVER": server.target, "COLUMNS": "200"} | environ
        return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin, env=environ)

    return invoke


def ok(result: Result) -> str:
    assert result.exit_code == 0, result.output
    return result.stdout


def test_generate_streams_the_answer_and_nothing_else_to_stdout(run: Run, server: FakeServer) -> None:
    result = run("generate", "hi", "--adapter", "sql", "--scale", 0.5, "--max-tokens", 3, "--stop", "a", "--stop", "b")
    assert (ok(result), result.stderr) == ("Hello wörld\n", "")
    request = server.seen["GenerateStream"][0].request
    assert [(message.role, message.content) for message in request.chat.messages] == [("user", "hi")]
    assert (request.adapters[0].name, request.adapters[0].scale) == ("sql", 0.5)
    assert (request.sampling.max_tokens, list(request.sampling.stop)) == (3, ["a", "b"])
    assert not request.sampling.HasField("temperature")
    assert not request.sampling.HasField("ignore_eos")


def test_generate_ends_with_one_newline(run: Run, server: FakeServer) -> None:
    server.script["GenerateStream"].append(answer(pieces("a\n")))
    assert ok(run("generate", "hi")) == "a\n"


def test_generate_shows_text_as_it_is(run: Run, server: FakeServer) -> None:
    server.script["GenerateStream"].append(answer(pieces("[bold]a[/bold] :smile:")))
    assert ok(run("generate", "hi")) == "[bold]a[/bold] :smile:\n"


def test_generate_raw_with_every_sampling_option(run: Run, server: FakeServer) -> None:
    options = {
        "temperature": 0.5,
        "top_p": 0.25,
        "top_k": 4,
        "min_p": 0.125,
        "repetition_penalty": 1.5,
        "presence_penalty": -1.0,
        "frequency_penalty": 0.75,
        "seed": 2**64 - 1,
    }
    arguments = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]
    ok(run("generate", "hi", "--raw", *arguments, "--stop-token-id", 5, "--stop-token-id", 6, "--ignore-eos"))
    request = server.seen["GenerateStream"][0].request
    assert request.text == "hi"
    assert {name: getattr(request.sampling, name) for name in options} == options
    assert (list(request.sampling.stop_token_ids), request.sampling.ignore_eos) == ([5, 6], True)


def test_generate_reads_the_prompt_from_stdin(run: Run, server: FakeServer) -> None:
    ok(run("generate", "-", "--system", "be brief", stdin="line\n\n"))
    messages = server.seen["GenerateStream"][0].request.chat.messages
    assert [(message.role, message.content) for message in messages] == [("system", "be brief"), ("user", "line\n")]


def test_generate_json(run: Run, server: FakeServer) -> None:
    document = json.loads(ok(run("generate", "hi", "--json", "--logprobs", 2)))
    assert document["choices"][0]["text"] == "base says hi"
    assert document["choices"][0]["finish_reason"] == "length"
    assert document["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "cached_tokens": 2}
    assert document["adapter_digest"] == DIGEST
    assert server.seen["Generate"][0].request.sampling.logprobs == 2


def test_generate_several_choices(run: Run, server: FakeServer) -> None:
    assert ok(run("generate", "hi", "-n", 2)) == "[0] base says hi\n"
    assert server.seen["Generate"][0].request.sampling.n == 2


def test_generate_verbose_tells_usage_on_stderr(run: Run) -> None:
    result = run("generate", "hi", "-v")
    assert ok(result) == "Hello wörld\n"
    for part in ("prompt 3 tokens (1 cached)", "output 3 tokens", "finished: stop", DIGEST):
        assert part in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate"],
        ["generate", "hi", "--raw", "--system", "x"],
        ["generate", "hi", "--logprobs", "2"],
        ["generate", "hi", "--max-tokens", "many"],
        ["generate", "hi", "--timeout", "0"],
        ["adapter", "alias", "prod"],
        ["adapter", "alias", "prod", "a", "--delete"],
        ["adapter", "alias", "prod", "a=x"],
        ["adapter", "alias", "prod", "a=1", "a=2"],
        ["adapter", "register", "a", "b", "--sampling", "temperature"],
        ["adapter", "register", "a", "b", "--sampling", "heat=1"],
        ["adapter", "register", "a", "b", "--sampling", "ignore_eos=1"],
        ["adapter", "update", "a", "--tag", "t", "--no-tags"],
        ["adapter", "upload", "a", "/nowhere"],
        ["merge", "--adapter", "a", "--output", "o"],
        ["merge", "--adapter", "a", "--output", "o", "--server", "x", "--model", "y"],
        ["merge", "--adapter", "a", "--output", "o", "--server", "x", "--quantization", "nf4"],
        ["merge", "--adapter", "a", "--output", "o", "--model", "m", "--base", "dequantized"],
        ["merge", "--adapter", "a=x", "--output", "o", "--model", "m"],
        ["merge", "--adapter", "a", "--adapter", "a=2", "--output", "o", "--model", "m"],
        ["merge", "--adapter", "a=2", "--output", "o", "--model", "m", "--scale", "2"],
        ["merge", "--adapter", "a", "--output", "o", "--model", "m", "--max-shard-size", "large"],
        ["serve"],
        ["serve", "--model", "m", "--quantization", "nf5"],
        ["serve", "--model", "m", "--kv-cache-memory", "much"],
        ["serve", "--model", "m", "--max-num-seqs", "0"],
        ["nothing"],
    ],
)
def test_wrong_usage_has_status_2(run: Run, server: FakeServer, arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert server.seen == {}


def test_an_error_is_one_line(run: Run, server: FakeServer) -> None:
    server.script["GenerateStream"].append(fail(grpc.StatusCode.NOT_FOUND, "no adapter [sql];\nthere is sql-2"))
    result = run("generate", "hi", "--adapter", "[sql]")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "error: no adapter [sql]; there is sql-2\n"


def test_debug_shows_the_traceback(run: Run, server: FakeServer) -> None:
    server.script["GenerateStream"].append(fail(grpc.StatusCode.NOT_FOUND, "no adapter sql"))
    result = run("--debug", "generate", "hi")
    assert (result.exit_code, str(result.exception)) == (1, "no adapter sql")


def test_a_refused_registration_lists_what_does_not_fit(run: Run, server: FakeServer) -> None:
    failure = error_details_pb2.PreconditionFailure()
    failure.violations.add(type="BIND", subject="x_proj", description="the base has no x_proj")
    info = error_info("BIND", report_id="rep-1", violation_count="24")
    server.script["RegisterAdapter"].append(fail(grpc.StatusCode.FAILED_PRECONDITION, "does not fit", failure, info))
    result = run("adapter", "register", "a", "/adapters/a")
    assert result.exit_code == 1
    assert result.stderr.splitlines() == [
        "error: does not fit",
        "  x_proj: the base has no x_proj",
        "  and 23 more; all of it: loraplex adapter report rep-1",
    ]


def test_no_server_says_what_to_do(run: Run) -> None:
    with FakeServer() as gone:
        target = gone.target
    result = run("adapter", "list", "--server", target)
    assert result.exit_code == 1
    assert "loraplex serve" in result.stderr


def test_an_internal_error_names_its_request(run: Run, server: FakeServer) -> None:
    server.script["ListAdapters"].append(fail(grpc.StatusCode.INTERNAL, "boom"))
    assert "under request from-the-server" in run("adapter", "list").stderr


def test_a_file_that_is_in_the_way(run: Run, tmp_path: Path) -> None:
    (tmp_path / "not.gguf").write_bytes(b"nothing of the kind")
    result = run("model", "import", tmp_path / "not.gguf", tmp_path / "out")
    assert result.exit_code == 1
    assert "is not a GGUF file" in result.stderr
    assert result.stderr.startswith("error: ")


def test_adapter_register_and_upload(run: Run, server: FakeServer, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"x" * 100)
    assert ok(run("adapter", "register", "a", "there/a", "--description", "d")) == (
        f"registered a@2 ({DIGEST}, rank 8, before: sha256:old)\n"
    )
    ok(run("adapter", "register", "a", os.path.relpath(tmp_path)))
    said = ["--tag", "x", "--tag", "y", "--owner", "me", "--expected-digest", DIGEST]
    sampling = ["--sampling", "temperature=0.5", "--sampling", "stop=a", "--sampling", "stop=b=c"]
    ok(run("adapter", "register", "a", "hf://org/repo", *said, *sampling, "--sampling", "ignore_eos=true"))
    paths = [seen.request.path for seen in server.seen["RegisterAdapter"]]
    assert paths == ["there/a", str(tmp_path.resolve()), "hf://org/repo"]
    request = server.seen["RegisterAdapter"][-1].request
    assert (list(request.tags), request.owner, request.expected_digest) == (["x", "y"], "me", DIGEST)
    defaults = request.default_sampling
    assert (defaults.temperature, list(defaults.stop), defaults.ignore_eos) == (0.5, ["a", "b=c"], True)
    assert not server.seen["RegisterAdapter"][0].request.HasField("default_sampling")
    assert ok(run("adapter", "upload", "b", tmp_path)) == f"registered b@2 ({DIGEST}, rank 8)\n"
    document = json.loads(ok(run("adapter", "upload", "b", tmp_path, "--json")))
    assert document["adapter"]["created_at"] == "2023-11-14T22:13:20+00:00"
    ok(run("adapter", "upload", "b", tmp_path, *said, *sampling))
    header = server.seen["UploadAdapter"][-1].request[0].header
    assert (list(header.tags), header.owner, header.expected_digest) == (["x", "y"], "me", DIGEST)
    assert list(header.default_sampling.stop) == ["a", "b=c"]


def test_adapter_download(run: Run, tmp_path: Path) -> None:
    assert ok(run("adapter", "download", "a@2", tmp_path / "a")) == f"downloaded a@2 ({DIGEST}) to {tmp_path / 'a'}\n"
    assert (tmp_path / "a" / "adapter_config.json").read_text() == "{}"
    assert json.loads(ok(run("adapter", "download", "a", tmp_path / "b", "--json")))["folder"] == str(tmp_path / "b")


def test_adapter_list_and_show(run: Run, server: FakeServer) -> None:
    table = ok(run("adapter", "list", "--contains", "x", "--tag", "t", "--tag", "u", "--owner", "me"))
    request = server.seen["ListAdapters"][0].request
    assert (request.name_contains, list(request.tags), request.owner) == ("x", ["t", "u"], "me")
    for part in ("a-alias", "b-alias", "2KiB", "abababab", "stored"):
        assert part in table
    assert [entry["name"] for entry in json.loads(ok(run("adapter", "list", "--json")))] == ["a", "b"]
    server.script["ListAdapters"].append(answer(adapter_pb2.ListAdaptersResponse()))
    empty = run("adapter", "list")
    assert (ok(empty), empty.stderr) == ("", "no adapters\n")
    shown = ok(run("adapter", "show", "a"))
    parts = (DIGEST, "q_proj, v_proj", "2023-11-14 22:13:20+00:00", "temperature=0.7, stop=('END',)", "hf://org/repo")
    for part in (*parts, "x, y", "7 requests, 70 prompt and 700 new tokens, last 2023-11-14 22:15:00+00:00", "1KiB"):
        assert part in shown
    assert json.loads(ok(run("adapter", "show", "a", "--json")))["rank"] == 8


def test_adapter_changes(run: Run, server: FakeServer) -> None:
    gone = ok(run("adapter", "unregister", "a", "b@2", "--drain-timeout", 5))
    assert "1KiB of device memory, 2KiB of host memory and 4KiB of disk came free; 2 requests still run" in gone
    asked = [(seen.request.name, seen.request.drain_timeout_s) for seen in server.seen["UnregisterAdapter"]]
    assert asked == [("a", 5), ("b@2", 5)]
    assert json.loads(ok(run("adapter", "unregister", "a", "--json")))["a"]["disk_bytes_freed"] == 4096
    assert not server.seen["UnregisterAdapter"][-1].request.HasField("drain_timeout_s")
    assert ok(run("adapter", "pin", "a")) == f"pinned a ({DIGEST})\n"
    assert ok(run("adapter", "unpin", "a")) == f"unpinned a ({DIGEST})\n"
    assert ok(run("adapter", "alias", "prod", "a")) == "prod -> a (before: before)\n"
    assert ok(run("adapter", "alias", "prod", "--delete")) == "deleted the alias prod\n"
    canary = json.loads(ok(run("adapter", "alias", "prod", "a@1=9", "a=1", "--json")))
    assert canary["targets"] == [{"name": "a@1", "weight": 9}, {"name": "a", "weight": 1}]
    assert ok(run("adapter", "alias", "prod", "a@1=9", "a=1")) == "prod -> a@1 (90.0%), a (10.0%) (before: before)\n"
    assert ok(run("adapter", "rollback", "prod")) == "prod -> a@1 (90.0%), b (10.0%)\n"
    ok(run("adapter", "update", "a", "--description", "", "--no-tags"))
    ok(run("adapter", "update", "a", "--owner", "you", "--tag", "t", "--no-sampling"))
    first, second = (seen.request for seen in server.seen["UpdateAdapter"])
    assert [first.HasField(name) for name in ("description", "tags", "owner", "default_sampling")] == [1, 1, 0, 0]
    assert [second.HasField(name) for name in ("description", "tags", "owner", "default_sampling")] == [0, 1, 1, 1]
    assert (list(first.tags.values), list(second.tags.values), second.owner) == ([], ["t"], "you")
    assert json.loads(ok(run("adapter", "pin", "a", "--json")))["version"] == 2
    assert ok(run("adapter", "report", "rep-1")) == "x_proj: the base has no x_proj\n"
    assert len(json.loads(ok(run("adapter", "report", "rep-1", "--json")))["entries"]) == 2


def test_the_report_on_a_registered_adapter(run: Run, server: FakeServer) -> None:
    fits = adapter_pb2.BindEntry(subject="q.lora_A", module="layers.0.q", rank=8, scaling=2.0)
    row = adapter_pb2.BindEntry(subject="norm.weight", module="norm.weight")
    found = adapter_pb2.GetBindReportResponse(report_id=DIGEST, base_fingerprint="b", entries=[fits, row])
    server.script["GetBindReport"] += [fail(grpc.StatusCode.NOT_FOUND, "no report a"), answer(found)]
    lines = ok(run("adapter", "report", "a")).splitlines()
    assert lines == ["q.lora_A -> layers.0.q (rank 8, scaling 2)", "norm.weight -> norm.weight"]
    assert [seen.request.report_id for seen in server.seen["GetBindReport"]] == ["a", DIGEST]


def test_merge_on_a_server(run: Run, server: FakeServer) -> None:
    arguments = ["--adapter", "a", "--output", "out", "--base", "dequantized", "--scale", "0.5"]
    result = run("merge", *arguments, "--server", server.target)
    assert ok(result) == "/exports/m\n"
    assert "mean KL 0.001 nats" in result.stderr
    assert "of unmerged" in result.stderr
    request = server.seen["MergeAdapter"][0].request
    assert (request.adapter, request.output, request.scale) == ("a", "out", 0.5)
    assert request.base == export_pb2.MERGE_BASE_DEQUANTIZED
    assert not request.HasField("density")


def test_merge_several_on_a_server(run: Run, server: FakeServer, tmp_path: Path) -> None:
    (tmp_path / "prompts").write_text("first\n\nsecond\n")
    adapters = ["--adapter", "a=0.5", "--adapter", "b", "--method", "dare-ties", "--density", "0.25", "--seed", "7"]
    more = ["--quantize", "nf4", "--max-shard-size", "1GB", "--prompts", tmp_path / "prompts", "--max-mean-kl", "0.5"]
    ok(run("merge", *adapters, *more, "--speed", "--output", "out", "--server", server.target))
    request = server.seen["MergeAdapter"][0].request
    assert [(each.adapter, each.weight) for each in request.adapters] == [("a", 0.5), ("b", 1.0)]
    assert (request.adapter, request.HasField("scale")) == ("", False)
    assert (request.method, request.density, request.seed) == (export_pb2.MERGE_METHOD_DARE_TIES, 0.25, 7)
    assert (request.quantize, request.max_shard_bytes, request.max_mean_kl) == ("nf4", 10**9, 0.5)
    assert (list(request.prompts), request.measure_speed) == (["first", "second"], True)


def write_base(folder: Path) -> Path:
    """Write a Llama of one layer with zeros for its q_proj."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {"hidden_size": 4, "intermediate_size": 8, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=16, num_hidden_layers=1, tie_word_embeddings=True, **sizes))
    layer: Any = model.model.layers[0]
    layer.self_attn.q_proj.weight.data.zero_()
    model.save_pretrained(folder)
    return folder


def write_ones(folder: Path) -> Path:
    """Write an adapter of ones with a scaling of 2 for that q_proj."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    lora = {f"{prefix}.lora_A.weight": torch.ones(2, 4), f"{prefix}.lora_B.weight": torch.ones(4, 2)}
    save_file(lora, folder / "adapter_model.safetensors")
    return folder


def test_merge_here(run: Run, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    base, adapter, output = write_base(tmp_path / "base"), write_ones(tmp_path / "a=b"), tmp_path / "new" / "merged"
    arguments = ("merge", "--model", base, "--adapter", f"{adapter}=0.5", "--output", output)
    result = run(*arguments)
    assert ok(result) == f"{output}\n"
    assert "same best token at 100.00%" in result.stderr
    module = "model.layers.0.self_attn.q_proj"
    merged = load_file(output / "model.safetensors")[f"{module}.weight"]
    assert torch.equal(merged, torch.full((4, 4), 2.0))  # weight 0.5, alpha / r = 2, and two ranks of ones
    again = run(*arguments)
    assert (again.exit_code, "exists" in again.stderr) == (1, True)


def test_merge_several_here(run: Run, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    base, adapter, other = write_base(tmp_path / "base"), write_ones(tmp_path / "one"), write_ones(tmp_path / "two")
    (tmp_path / "prompts").write_text("first\n\nsecond\n")
    arguments = ("merge", "--model", base, "--adapter", f"{adapter}=0.5", "--adapter", f"{other}=-0.25")
    told = json.loads(ok(run(*arguments, "--output", tmp_path / "m", "--json")))
    assert told["comparison"]["top1_agreement"] == 1.0
    assert len(told["adapter_digests"]) == 2
    merged = load_file(tmp_path / "m" / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    assert torch.equal(merged, torch.ones(4, 4))
    refused = run(*arguments, "--output", tmp_path / "n", "--method", "ties", "--density", "2")
    assert (refused.exit_code, "density" in refused.stderr) == (1, True)
    # A model without a tokenizer cannot be compared on texts.
    refused = run(*arguments, "--output", tmp_path / "n", "--prompts", tmp_path / "prompts")
    assert (refused.exit_code, "prompts" in refused.stderr) == (1, True)
    too_far = run("merge", "--model", base, "--adapter", adapter, "--output", tmp_path / "n", "--max-mean-kl", "-1")
    assert (too_far.exit_code, "max_mean_kl" in too_far.stderr) == (1, True)
    assert not (tmp_path / "n").exists()


@pytest.fixture
def configs(monkeypatch: pytest.MonkeyPatch) -> list[ServerConfig]:
    """Collect what `serve` would have served."""
    configs: list[ServerConfig] = []
    monkeypatch.setattr(serve, "run", configs.append)
    return configs


def test_serve_defaults_are_the_configurations(run: Run, configs: list[ServerConfig]) -> None:
    ok(run("serve", "--model", "m"))
    assert configs == [ServerConfig(ModelConfig("m"), served_model_name="m")]


def test_serve_options(run: Run, configs: list[ServerConfig]) -> None:
    ok(
        run(
            *("serve", "--model", "m", "--quantization", "nf4", "--dtype", "bfloat16", "--device", "cuda:1"),
            *("--weight-execution", "packed", "--served-model-name", "shown", "--adapters", "a", "--adapters", "b"),
            *("--adapter-root", "r", "--state-dir", "s", "--export-root", "e", "--host", "0.0.0.0", "--port", 1),
            *("--metrics-host", "::", "--metrics-port", 2, "--grace-period", 3.5, "--log-level", "debug"),
            *("--max-num-seqs", 4, "--max-num-batched-tokens", 5, "--max-model-len", 6, "--max-waiting", 7),
            *("--block-size", 8, "--kv-cache-memory", "9MiB", "--adapter-device-memory", "1.5GiB", "--threads", 10),
            *("--adapter-host-memory", "3GiB"),
            *("--adapter-dtype", "float32", "--no-prefix-caching", "--adapter-source", "hf://org"),
            *("--adapter-source", "s3://bucket/adapters", "--adapter-source-timeout", 9, "--max-upload-size", "1GiB"),
        )
    )
    assert configs == [
        ServerConfig(
            model=ModelConfig("m", "nf4", "bfloat16", "cuda:1", "packed"),
            engine=EngineConfig(
                max_num_seqs=4,
                max_num_batched_tokens=5,
                max_model_len=6,
                max_waiting=7,
                block_size=8,
                kv_cache_memory=9 * MIB,
                adapter_device_memory=1536 * MIB,
                adapter_host_memory=3 * 1024 * MIB,
                adapter_dtype="float32",
                enable_prefix_caching=False,
                threads=10,
            ),
            adapters=(Path("a"), Path("b")),
            adapter_roots=(Path("r"),),
            sources=SourcePolicy(("hf://org", "s3://bucket/adapters"), 1024 * MIB, 9.0),
            state_dir=Path("s"),
            export_root=Path("e"),
            host="0.0.0.0",
            port=1,
            metrics_host="::",
            metrics_port=2,
            grace_period_s=3.5,
            served_model_name="shown",
            log_level="debug",
        )
    ]


def test_sizes() -> None:
    sizes = {"512MiB": 512 * MIB, "1.5GiB": 1536 * MIB, "2k": 2048, "1MB": 10**6, "7": 7, " 3 B ": 3, "1TiB": 2**40}
    assert {text: parse_size(text, "--x") for text in sizes} == sizes
    for size, text in ((0, "0B"), (1023, "1023B"), (1024, "1KiB"), (1536 * MIB, "1.5GiB"), (2**52, "4096TiB")):
        assert format_size(size) == text


def test_the_default_server_is_the_clients() -> None:
    assert connection.DEFAULT_SERVER == DEFAULT_TARGET


def test_interrupting_an_answer_cancels_it(server: FakeServer) -> None:
    server.script["GenerateStream"].append(then_fail(pieces("first")[:1], hang))
    command = [sys.executable, "-m", "loraplex.cli", "generate", "hi", "--server", server.target]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.read(5) == b"first"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert (process.returncode, b"Traceback" in errors) == (130, False)
    assert server.seen["GenerateStream"][0].ended.wait(10)


def test_version(run: Run) -> None:
    assert ok(run("version")) == ok(run("--version"))
    assert ok(run("version")).startswith("loraplex 0")


def test_help_imports_nothing_that_is_slow() -> None:
    script = """
import sys
from typer.testing import CliRunner
from loraplex.cli.main import app
result = CliRunner().invoke(app, ["--help"])
assert result.exit_code == 0, result.output
print(*(name for name in ("grpc", "torch", "transformers", "numpy", "loraplex.client") if name in sys.modules))
"""
    done: Any = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == []
