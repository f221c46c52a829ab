"""The command, against a scripted server: what it sends, what it writes where, and its exit status."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest
import typer
from typer.testing import CliRunner

from loraplex.cli import connection
from loraplex.cli.reporting import ReportingGroup
from loraplex.client import DEFAULT_TARGET
from tests.unit.command import Run, ok
from tests.unit.fake_server import DIGEST, FakeServer, answer, fail, hang, pieces, then_fail


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
    assert (process.returncode, b"Traceback" in errors) == (130, False), errors.decode()
    assert server.seen["GenerateStream"][0].ended.wait(10)


def test_what_fails_because_of_an_interrupt_is_an_interrupt() -> None:
    app = typer.Typer(cls=ReportingGroup)

    @app.callback()
    def root() -> None:
        pass

    @app.command()
    def fails() -> None:
        try:
            raise KeyboardInterrupt
        finally:
            raise RuntimeError("closing failed too")

    result = CliRunner().invoke(app, ["fails"])
    assert (result.exit_code, "closing" in result.output) == (130, False)


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
