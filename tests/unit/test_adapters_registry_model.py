"""The registry against a simple model of it, over random sequences of calls and restarts."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from loraplex.adapters.errors import (
    AlreadyExistsError,
    InvalidRequestError,
    LoraplexError,
    NotFoundError,
    PreconditionError,
)
from loraplex.adapters.formats import read_adapter
from loraplex.adapters.registry import AdapterRegistry
from tests.adapter_factory import tiny_base, write_adapter
from tests.unit.conftest import to

names = st.sampled_from(["a", "b", "c"])
contents = st.integers(0, 2)


class RegistryMachine(RuleBasedStateMachine):
    """`versions`, `aliases` and `active` say what the registry should hold."""

    def __init__(self) -> None:
        super().__init__()
        self.tmp = Path(tempfile.mkdtemp())
        self.folders = [write_adapter(self.tmp / "source" / str(seed), seed=seed) for seed in range(3)]
        self.digests = [read_adapter(folder).digest for folder in self.folders]
        self.bad = write_adapter(self.tmp / "source" / "bad", r=16)
        self.versions: dict[str, list[str]] = {}
        self.aliases: dict[str, str] = {}
        self.active: Counter[str] = Counter()
        self.open()

    def open(self) -> None:
        self.registry = AdapterRegistry(self.tmp / "root", tiny_base(), [self.tmp / "source"])

    def teardown(self) -> None:
        self.registry.close()
        shutil.rmtree(self.tmp)

    def refused(self, kind: type[LoraplexError], call: object, *args: object) -> None:
        assert callable(call)
        with pytest.raises(kind):
            call(*args)

    @rule(name=names, content=contents)
    def register(self, name: str, content: int) -> None:
        if name in self.aliases:
            self.refused(AlreadyExistsError, self.registry.register, name, self.folders[content])
            return
        registration = self.registry.register(name, self.folders[content])
        known = self.versions.setdefault(name, [])
        assert registration.previous_digest == (known[-1] if known else None)
        assert registration.record.digest == self.digests[content]
        if not known or known[-1] != self.digests[content]:
            known.append(self.digests[content])

    @rule(name=names)
    def register_bad(self, name: str) -> None:
        self.refused(PreconditionError, self.registry.register, name, self.bad)

    @rule(name=names)
    def unregister(self, name: str) -> None:
        if name in self.aliases:
            self.refused(InvalidRequestError, self.registry.unregister, name)
        elif name not in self.versions:
            self.refused(NotFoundError, self.registry.unregister, name)
        elif name in self.aliases.values():
            self.refused(PreconditionError, self.registry.unregister, name)
        else:
            gone = self.registry.unregister(name)
            versions = self.versions.pop(name)
            assert gone.digest == versions[-1]
            assert gone.active_requests == sum(self.active[digest] for digest in set(versions))

    @rule(name=names, content=st.none() | contents)
    def acquire(self, name: str, content: int | None) -> None:
        versions = self.versions.get(self.aliases.get(name, name), [])
        wanted = versions[-1:] if content is None else [d for d in versions if d == self.digests[content]]
        selector = name if content is None else f"{name}@{self.digests[content]}"
        if not wanted:
            self.refused(NotFoundError, self.registry.acquire, selector)
            return
        record = self.registry.acquire(selector)
        self.active[wanted[0]] += 1
        assert (record.digest, record.active_requests) == (wanted[0], self.active[wanted[0]])

    @precondition(lambda self: +self.active)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        digest = data.draw(st.sampled_from(sorted(+self.active)))
        self.registry.release(digest)
        self.active[digest] -= 1

    @rule(alias=names, name=names)
    def set_alias(self, alias: str, name: str) -> None:
        if name in self.aliases:
            self.refused(InvalidRequestError, self.registry.aliases.set, alias, to(name))
        elif name not in self.versions:
            self.refused(NotFoundError, self.registry.aliases.set, alias, to(name))
        elif alias in self.versions:
            self.refused(AlreadyExistsError, self.registry.aliases.set, alias, to(name))
        else:
            before = to(self.aliases[alias]) if alias in self.aliases else ()
            assert self.registry.aliases.set(alias, to(name)) == before
            self.aliases[alias] = name

    @rule(alias=names)
    def delete_alias(self, alias: str) -> None:
        if alias in self.aliases:
            self.registry.aliases.delete(alias)
            del self.aliases[alias]
        else:
            self.refused(NotFoundError, self.registry.aliases.delete, alias)

    @rule()
    def restart(self) -> None:
        self.registry.close()
        self.active.clear()
        self.open()

    @invariant()
    def names_mean_what_the_model_says(self) -> None:
        records = {record.name: record for record in self.registry.list().records}
        assert {name: record.digest for name, record in records.items()} == {n: v[-1] for n, v in self.versions.items()}
        for name, record in records.items():
            assert record.aliases == tuple(sorted(a for a, n in self.aliases.items() if n == name))
            assert record.active_requests == self.active[record.digest]

    @invariant()
    def only_needed_weights_are_kept(self) -> None:
        self.registry.check_integrity()
        needed = {digest for versions in self.versions.values() for digest in versions} | set(+self.active)
        stored = {"sha256:" + path.name for path in (self.tmp / "root" / "store" / "sha256").iterdir()}
        assert stored == needed
        assert list((self.tmp / "root" / "store" / "staging").iterdir()) == []


TestRegistryModel = RegistryMachine.TestCase
TestRegistryModel.settings = settings(deadline=None, max_examples=25, stateful_step_count=25)
