"""Fixtures that several unit tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from loraplex.adapters.alias import AliasTarget
from loraplex.adapters.binding import BaseModel
from loraplex.adapters.registry import AdapterRegistry
from loraplex.cli.main import app
from tests.adapter_factory import tiny_base, write_adapter
from tests.unit.command import Run
from tests.unit.fake_server import FakeServer


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """An allowed root with adapters `one` and `two`."""
    write_adapter(tmp_path / "source" / "one", seed=1)
    write_adapter(tmp_path / "source" / "two", seed=2, template="two's template")
    return tmp_path / "source"


class Opener:
    """Opens the registry of a test, again and again; what it leaves behind must be whole each time."""

    def __init__(self, tmp_path: Path) -> None:
        self._tmp_path = tmp_path
        self._open: AdapterRegistry | None = None

    def __call__(self, base: BaseModel | None = None) -> AdapterRegistry:
        self.close()
        self._open = AdapterRegistry(self._tmp_path / "root", base or tiny_base(), [self._tmp_path / "source"])
        return self._open

    def close(self) -> None:
        if self._open is not None:
            self._open.check_integrity()
            self._open.close()
            self._open = None


@pytest.fixture
def opener(tmp_path: Path, source: Path) -> Iterator[Opener]:
    made = Opener(tmp_path)
    yield made
    made.close()


@pytest.fixture
def registry(opener: Opener) -> AdapterRegistry:
    return opener()


def blobs(tmp_path: Path) -> set[str]:
    return {"sha256:" + path.name for path in (tmp_path / "root" / "store" / "sha256").iterdir()}


def to(*names: str, **weights: float) -> tuple[AliasTarget, ...]:
    """An alias's targets."""
    return (*map(AliasTarget, names), *(AliasTarget(name, weight) for name, weight in weights.items()))


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
