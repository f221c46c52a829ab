"""The memory of a real server process: adapters that come and go leave nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from loraplex.bench.population import Population
from loraplex.bench.process_memory import resident_mb
from loraplex.bench.random_adapter import ModelShape
from loraplex.bench.scrape import Scrape
from loraplex.bench.server_process import ServerProcess
from loraplex.client import Client

SETTLED, ROUNDS = 16, 48
RANK = 4096
"""So that an adapter has some megabytes although the model is tiny."""


@pytest.mark.slow
def test_rounds_of_register_use_and_unregister_leave_the_memory_flat(model_folder: Path, tmp_path: Path) -> None:
    folders = Population(ModelShape.of(model_folder), RANK, ROUNDS).write(tmp_path / "adapters")
    arguments = ["--model", str(model_folder), "--dtype", "float32", "--threads", "1", "--kv-cache-memory", "8MiB"]
    arguments += ["--adapter-root", str(tmp_path / "adapters")]
    with ServerProcess(arguments, tmp_path / "server.log") as server:
        server.wait_until_ready()
        with Client(server.target) as client:
            for number, folder in enumerate(folders):
                client.register_adapter("round", folder)
                answer = client.generate("The quick", "round", max_tokens=2, ignore_eos=True)
                assert answer.adapter_digest == client.get_adapter("round").digest
                freed = client.unregister_adapter("round")
                assert freed.device_bytes_freed == freed.host_bytes_freed > 3e6
                if number + 1 == SETTLED:
                    settled = resident_mb(server.pid)
        grown = resident_mb(server.pid) - settled
        scrape = Scrape.of(server.metrics_url)
    assert settled > 0
    each = freed.device_bytes_freed / 1e6
    assert (ROUNDS - SETTLED) * each > 0.15 * settled, "a leak would not show"
    assert grown <= 0.05 * settled
    for tier in ("device", "host"):
        assert scrape.value("loraplex_adapter_memory_bytes", tier=tier) == 0
        assert scrape.value("loraplex_adapters", tier=tier) == 0
        assert scrape.value("loraplex_adapter_loads_total", tier=tier) == ROUNDS
