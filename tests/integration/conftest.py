"""One real server for all tests that leave it as it was."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from loraplex.client import Client
from tests.integration.serving import Folders, RunningServer, eventually, fitting_adapter, greedy_ids, write_model


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def folders(model_folder: Path, tmp_path: Path) -> Folders:
    """Folders of their own for a test that starts its own server."""
    return _folders(model_folder, tmp_path)


@pytest.fixture(scope="session")
def shared(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """The server of the session; use `server`."""
    with (
        RunningServer(_folders(model_folder, tmp_path_factory.mktemp("server"))) as running,
        running.client() as client,
    ):
        client.register_adapter("alpha", fitting_adapter(running.folders.adapters / "alpha", seed=11))
        client.register_adapter("beta", fitting_adapter(running.folders.adapters / "beta", seed=12))
        yield running


@pytest.fixture(scope="session")
def expected(shared: RunningServer) -> dict[str, tuple[int, ...]]:
    """What base and adapters answer, before any test has done anything."""
    with shared.client() as client:
        answers = {name: greedy_ids(client, name) for name in ("", "alpha", "beta")}
    assert len(set(answers.values())) == 3
    return answers


@pytest.fixture
def server(shared: RunningServer, expected: dict[str, tuple[int, ...]]) -> Iterator[RunningServer]:
    """The shared server; afterwards it must still serve, hold nothing, and have the adapters it had."""
    with shared.client() as client:
        before = {adapter.name: adapter.digest for adapter in client.list_adapters()}
        yield shared
        assert {name: greedy_ids(client, name) for name in expected} == expected
        assert {adapter.name: adapter.digest for adapter in client.list_adapters()} == before
    eventually(lambda: shared.is_idle, "the server is idle")
    assert not list((shared.folders.state / "incoming").iterdir())


@pytest.fixture
def client(server: RunningServer) -> Iterator[Client]:
    with server.client() as client:
        yield client


def _folders(model: Path, root: Path) -> Folders:
    folders = Folders(model, root / "adapters", root / "state", root / "export")
    folders.adapters.mkdir()
    folders.export.mkdir()
    return folders
