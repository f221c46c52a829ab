"""Driver of this project's own server: `loraplex serve` as a process, requests over gRPC, a stream for each."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from loraplex.bench.load import load_client
from loraplex.bench.peers.driver import Facts, Job, Request, converse
from loraplex.bench.server_process import ServerProcess
from loraplex.client import AsyncClient


class Loraplex:
    """A `System` whose server is a process beside this one; runs in our interpreter."""

    def __init__(self) -> None:
        self._server: ServerProcess | None = None
        self._client: AsyncClient | None = None
        self._runner = asyncio.Runner()

    def prepare(self, job: Job) -> None:
        """Nothing is to be prepared."""

    def start(self, job: Job) -> Facts:
        """Start the server and upload the adapters."""
        quantization = job.options["quantization"]
        arguments = ["--model", str(job.model), "--quantization", quantization, "--threads", str(job.threads)]
        self._server = ServerProcess(arguments, job.scratch / f"loraplex-{quantization}.log")
        self._server.wait_until_ready()
        self._client = load_client(self._server.target)
        self._runner.run(self._upload(self._client, job))
        return Facts(f"loraplex {job.options['version']}", quantization, "its gRPC server, a stream for each request")

    def run(self, requests: Sequence[Request], max_tokens: int) -> list[list[int]]:
        """Send all requests at once."""
        assert self._client is not None
        return self._runner.run(self._run(self._client, requests, max_tokens))

    def stop(self) -> None:
        """End the server."""
        if self._client is not None:
            self._runner.run(self._client.close())
        self._runner.close()
        if self._server is not None:
            self._server.stop()

    @staticmethod
    async def _upload(client: AsyncClient, job: Job) -> None:
        for name, folder in job.adapters.items():
            await client.upload_adapter(name, folder)

    @staticmethod
    async def _run(client: AsyncClient, requests: Sequence[Request], max_tokens: int) -> list[list[int]]:
        return await asyncio.gather(*(_stream(client, request, max_tokens) for request in requests))


async def _stream(client: AsyncClient, request: Request, max_tokens: int) -> list[int]:
    stream = client.stream(request.prompt, request.adapter, max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    return [token async for piece in stream for choice in piece.choices for token in choice.token_ids]


if __name__ == "__main__":
    converse(Loraplex())
