"""Kills a process at many points of what it does to a registry, and looks at what is left. Run as a program.

`python -m tests.integration.registry_killer FOLDER POINTS SEED` works in the empty FOLDER and prints what it did as
JSON; it ends with an AssertionError at the first kill that left anything but the state before or after the operation.
Each victim is forked, so that it costs milliseconds; that is why this is no test itself: a test's process has threads.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import fsspec

from loraplex.adapters.alias import AliasTarget
from loraplex.adapters.metadata import MetadataChange
from loraplex.adapters.registry import AdapterRegistry
from loraplex.adapters.sources import SourcePolicy
from loraplex.adapters.upload import UploadFile, UploadStager
from tests.adapter_factory import tiny_base, write_adapter

Operation = Callable[[AdapterRegistry], object]
State = dict[str, Any]

# A victim dies between two lines of these: ours, and what stands between us and the disk.
_TRACED = (
    *(
        "alias_book",
        "catalog",
        "disk",
        "folder",
        "intake",
        "pins",
        "publisher",
        "registry",
        "schema",
        "sources",
        "stock",
        "store",
        "usage_book",
    ),
    *("upload", "usage"),
)
_BELOW = ("sqlalchemy/engine/default.py", "shutil.py", "pathlib.py", "tempfile.py")


def operations(source: Path) -> list[Operation]:
    """What happens to the registry, one after the other; each changes it."""
    one, two, three = (write_adapter(source / name, seed=seed, template=name) for seed, name in enumerate("123"))
    memory = fsspec.filesystem("memory")
    for path in two.iterdir():
        memory.pipe_file(f"/adapters/two/{path.name}", path.read_bytes())

    def upload(registry: AdapterRegistry) -> None:
        files = {path.name: path.read_bytes() for path in three.iterdir()}
        header = [UploadFile(name, len(data), hashlib.sha256(data).hexdigest()) for name, data in files.items()]
        with UploadStager(registry.incoming, header, registry.max_bytes) as stager:
            for name, data in files.items():
                stager.write(name, data)
            registry.register_upload("c", stager.finish())

    return [
        lambda registry: registry.register("a", one),
        lambda registry: registry.register("a", two, MetadataChange("text", ("x",), "me", {"top_k": 3})),
        lambda registry: registry.register("b", one),
        lambda registry: registry.aliases.set("live", [AliasTarget("a@1", 9), AliasTarget("b", 1)]),
        lambda registry: registry.aliases.set("live", [AliasTarget("a")]),
        lambda registry: registry.aliases.rollback("live"),
        lambda registry: registry.pins.add("a"),
        upload,
        lambda registry: registry.register("a", one),
        lambda registry: registry.update("b", MetadataChange(tags=("y",))),
        lambda registry: registry.unregister("a@2"),
        lambda registry: registry.aliases.set("live", [AliasTarget("c")]),
        lambda registry: registry.register("c", "memory://adapters/two"),
        lambda registry: registry.unregister("b"),
        lambda registry: registry.unregister("a"),
    ]


def opened(root: Path) -> AdapterRegistry:
    return AdapterRegistry(root, tiny_base(), [root.parent / "source"], SourcePolicy(("memory://adapters",)))


def state_of(registry: AdapterRegistry) -> State:
    """What a caller can see, without times."""
    now = registry.directory
    names = {
        name: [asdict(adapter.metadata), [[v.number, v.digest, v.source] for v in adapter.versions]]
        for name, adapter in now.names.items()
    }
    aliases = {name: asdict(alias) for name, alias in now.aliases.items()}
    state: State = json.loads(json.dumps({"names": names, "aliases": aliases, "pins": sorted(now.pins)}))
    return state


class Killer:
    """Knows the state after each operation, and has a copy of the registry before each."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.operations = operations(folder / "source")
        self._states: list[State] = []
        self.kills = self.before = self.after = 0
        root = folder / "root"
        for number, operation in enumerate([*self.operations, None]):
            registry = opened(root)
            self._states.append(state_of(registry))
            registry.close()
            shutil.copytree(root, folder / f"before{number}")
            if operation is not None:
                registry = opened(root)
                operation(registry)
                registry.close()
        assert all(a != b for a, b in zip(self._states, self._states[1:], strict=False))

    def at_lines(self, number: int, points: int, chance: random.Random) -> None:
        """Kill the process that does one operation at `points` of the lines that it runs, opening included.

        Every second one is among the last tenth, where the change becomes one.
        """
        total = self._victim(number, None)
        for point in range(points):
            share = (point + chance.random()) / points
            line = int((0.9 + share / 10 if point % 2 else share) * total)
            self._victim(number, line)
            self._judge(number, number, f"line {line} of {total} in operation {number}")

    def at_times(self, points: int, chance: random.Random) -> None:
        """Kill a process that does everything, at `points` moments."""
        begin = time.monotonic()
        self._all_operations(None)
        whole = time.monotonic() - begin
        for _ in range(points):
            moment = chance.random() * whole
            self._judge(0, self._all_operations(moment), f"{moment:.4f} of {whole:.4f} s")

    def _victim(self, number: int, kill_at: int | None) -> int:
        """Do one operation in a child that dies at the line `kill_at`; return how many lines it ran."""
        root = self._restored(number)
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            lines = _count_lines(kill_at)
            registry = opened(root)
            self.operations[number](registry)
            registry.close()
            sys.settrace(None)
            os.write(writing, str(lines[0]).encode())
            os._exit(0)
        os.close(writing)
        _, status = os.waitpid(pid, 0)
        told = os.read(reading, 100)
        os.close(reading)
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        assert killed if kill_at is not None else status == 0, f"operation {number} ended with {status}"
        return int(told or 0)

    def _all_operations(self, kill_after_s: float | None) -> int:
        """Do all operations in a child that is killed after a time; return how many it had finished."""
        root = self._restored(0)
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            registry = opened(root)
            for operation in self.operations:
                operation(registry)
                registry.usage.count("a", 1, 1)
                os.write(writing, b".")
            registry.close()
            os._exit(0)
        os.close(writing)
        if kill_after_s is not None:
            time.sleep(kill_after_s)
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        finished = len(os.read(reading, 1000))
        os.close(reading)
        assert status in (0, signal.SIGKILL), status
        return finished

    def _restored(self, number: int) -> Path:
        root = self._folder / "root"
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(self._folder / f"before{number}", root)
        return root

    def _judge(self, first: int, finished: int, when: str) -> None:
        """Check that the registry opens and is as it was after `finished` operations or one more, and can go on."""
        registry = opened(self._folder / "root")
        registry.check_integrity()
        assert not registry.warnings, (when, registry.warnings)
        left = [*registry.incoming.iterdir(), *(self._folder / "root" / "store" / "staging").iterdir()]
        assert not left, (when, left)
        for digest in registry.digests:
            assert registry.load(digest).digest == digest, when
        state = state_of(registry)
        last = min(finished + 1, len(self.operations))
        assert state in (self._states[finished], self._states[last]), (when, state)
        self.kills += 1
        if state == self._states[finished]:
            self.before += 1
            if finished < len(self.operations):
                self.operations[finished](registry)
                assert state_of(registry) == self._states[finished + 1], f"{when}: it does not go on"
        else:
            self.after += 1
        registry.close()


def _count_lines(kill_at: int | None) -> list[int]:
    """Count the lines that are run from now on, and die at the one numbered `kill_at`."""
    count = [0]
    wanted = tuple(f"/loraplex/adapters/{name}.py" for name in _TRACED) + tuple(f"/{name}" for name in _BELOW)

    def on_line(frame: FrameType, event: str, argument: object) -> Any:
        if event == "line":
            if count[0] == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            count[0] += 1
        return on_line

    def on_call(frame: FrameType, event: str, argument: object) -> Any:
        return on_line if frame.f_code.co_filename.endswith(wanted) else None

    sys.settrace(on_call)
    return count


def main(folder: Path, points: int, seed: int) -> None:
    chance = random.Random(seed)
    killer = Killer(folder)
    for number in range(len(killer.operations)):
        killer.at_lines(number, max(1, points // len(killer.operations)), chance)
    killer.at_times(max(1, points // 4), chance)
    print(json.dumps({"kills": killer.kills, "before": killer.before, "after": killer.after}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
