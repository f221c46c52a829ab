"""The registry against a simple model of it, over random sequences of calls and restarts."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from loraplex.adapters.alias import AliasTarget
from loraplex.adapters.errors import (
    AlreadyExistsError,
    InvalidRequestError,
    LoraplexError,
    NotFoundError,
    PreconditionError,
)
from loraplex.adapters.formats import read_adapter
from loraplex.adapters.metadata import Metadata, MetadataChange
from loraplex.adapters.records import AdapterFilter
from loraplex.adapters.registry import AdapterRegistry
from tests.adapter_factory import tiny_base, write_adapter

Targets = tuple[tuple[str, int | None, float], ...]
"""Name, version number or None, weight."""
names = st.sampled_from(["a", "b", "c"])
contents = st.integers(0, 2)
numbers = st.none() | st.integers(1, 4)
targets = st.lists(st.tuples(names, numbers, st.sampled_from([1.0, 3.0])), min_size=1, max_size=3).map(tuple)
tags = st.none() | st.sets(st.sampled_from("xyz")).map(lambda chosen: tuple(sorted(chosen)))


@dataclass
class Named:
    """What the model knows of a name; `versions` maps numbers to digests, in order."""

    versions: dict[int, str] = field(default_factory=dict)
    metadata: Metadata = field(default_factory=Metadata)
    requests: int = 0

    @property
    def current(self) -> str:
        return self.versions[max(self.versions)]


def text(name: str, number: int | None) -> str:
    return name if number is None else f"{name}@{number}"


class RegistryMachine(RuleBasedStateMachine):
    """The fields say what the registry should hold; `given` counts the numbers that each name has ever had."""

    def __init__(self) -> None:
        super().__init__()
        self.tmp = Path(tempfile.mkdtemp())
        self.folders = [write_adapter(self.tmp / "source" / str(seed), seed=seed) for seed in range(3)]
        self.digests = [read_adapter(folder).digest for folder in self.folders]
        self.bad = write_adapter(self.tmp / "source" / "bad", r=16)
        self.names: dict[str, Named] = {}
        self.given: Counter[str] = Counter()
        self.aliases: dict[str, tuple[Targets, Targets]] = {}
        self.pins: set[tuple[str, int | None]] = set()
        self.active: Counter[str] = Counter()
        self.open()

    def open(self) -> None:
        self.registry = AdapterRegistry(self.tmp / "root", tiny_base(), [self.tmp / "source"])

    def teardown(self) -> None:
        self.registry.close()
        shutil.rmtree(self.tmp)

    def refused(self, kind: type[LoraplexError], call: Callable[..., object], *args: object) -> None:
        with pytest.raises(kind):
            call(*args)

    def digest(self, name: str, number: int | None) -> str | None:
        """What a registered name means, or None."""
        known = self.names.get(name)
        if known is None:
            return None
        return known.current if number is None else known.versions.get(number)

    def candidates(self, name: str, number: int | None) -> set[str]:
        """All digests that a name or an alias may mean."""
        if name not in self.aliases:
            chosen = [self.digest(name, number)]
        elif number is None:
            chosen = [self.digest(target, version) for target, version, _ in self.aliases[name][0]]
        else:
            of = {target for target, _, _ in self.aliases[name][0]}
            chosen = [self.digest(of.pop(), number)] if len(of) == 1 else []
        return {digest for digest in chosen if digest is not None}

    @rule(name=names, content=contents, description=st.sampled_from([None, "d", "e"]), tags=tags)
    def register(self, name: str, content: int, description: str | None, tags: tuple[str, ...] | None) -> None:
        change = MetadataChange(description, tags)
        if name in self.aliases:
            self.refused(AlreadyExistsError, self.registry.register, name, self.folders[content], change)
            return
        registration = self.registry.register(name, self.folders[content], change)
        known = self.names.setdefault(name, Named())
        assert registration.previous_digest == (known.current if known.versions else None)
        assert registration.record.digest == self.digests[content]
        if not known.versions or known.current != self.digests[content]:
            self.given[name] += 1
            known.versions[self.given[name]] = self.digests[content]
        self.changed(known, description, tags)

    def changed(self, known: Named, description: str | None, tags: tuple[str, ...] | None) -> None:
        if description is not None:
            known.metadata = replace(known.metadata, description=description)
        if tags is not None:
            known.metadata = replace(known.metadata, tags=tags)

    @rule(name=names, expect=st.booleans())
    def register_bad(self, name: str, expect: bool) -> None:
        if expect:
            arguments: tuple[Any, ...] = (self.folders[0], MetadataChange(), self.digests[1])
        else:
            arguments = (self.bad,)
        self.refused(PreconditionError, self.registry.register, name, *arguments)

    @rule(name=names, description=st.sampled_from([None, "f"]), tags=tags)
    def update(self, name: str, description: str | None, tags: tuple[str, ...] | None) -> None:
        change = MetadataChange(description, tags)
        if name in self.names:
            self.registry.update(name, change)
            self.changed(self.names[name], description, tags)
        else:
            kind = InvalidRequestError if name in self.aliases else NotFoundError
            self.refused(kind, self.registry.update, name, change)

    @rule(name=names, number=numbers)
    def unregister(self, name: str, number: int | None) -> None:
        selector = text(name, number)
        if name in self.aliases:
            self.refused(InvalidRequestError, self.registry.unregister, selector)
            return
        digest = self.digest(name, number)
        if digest is None:
            self.refused(NotFoundError, self.registry.unregister, selector)
            return
        versions = self.names[name].versions
        gone = dict(versions) if number is None else {number: versions[number]}
        left = versions.keys() - gone.keys()
        needed = [version for now, _ in self.aliases.values() for target, version, _ in now if target == name]
        if any(not left if version is None else version in gone for version in needed):
            self.refused(PreconditionError, self.registry.unregister, selector)
            return
        told = self.registry.unregister(selector)
        assert (told.name, told.digest) == (name, digest)
        assert told.active_requests == sum(self.active[digest] for digest in set(gone.values()))
        for version in gone:
            del versions[version]
        if not versions:
            del self.names[name]
        self.pins = {pin for pin in self.pins if self.digest(*pin) is not None}
        assert set(told.unnamed) == set(gone.values()) - self.named()

    @rule(name=names, number=numbers, key=st.sampled_from([None, "", "u1", "u2"]))
    def acquire(self, name: str, number: int | None, key: str | None) -> None:
        selector, candidates = text(name, number), self.candidates(name, number)
        if not candidates:
            self.refused(NotFoundError, self.registry.acquire, selector, key)
            return
        record = self.registry.acquire(selector, key)
        assert record.digest in candidates
        if key:
            assert self.registry.acquire(selector, key).digest == record.digest, "sticky"
            self.registry.release(record.digest)
        self.active[record.digest] += 1
        self.registry.usage.count(record.name, 2, 3)
        self.names[record.name].requests += 1

    @rule(name=names, content=contents)
    def find_by_digest(self, name: str, content: int) -> None:
        digest = self.digests[content]
        known = self.names.get(name)
        if known is None or digest not in known.versions.values():
            if name not in self.aliases:
                self.refused(NotFoundError, self.registry.get, f"{name}@{digest}")
            return
        latest = max(number for number, found in known.versions.items() if found == digest)
        for selector in (f"{name}@{digest}", f"{name}@{digest[:20]}"):
            assert self.registry.get(selector).version.number == latest

    @precondition(lambda self: +self.active)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        digest = data.draw(st.sampled_from(sorted(+self.active)))
        self.registry.release(digest)
        self.active[digest] -= 1

    @rule(alias=names, wanted=targets)
    def set_alias(self, alias: str, wanted: Targets) -> None:
        given = tuple(AliasTarget(text(name, number), weight) for name, number, weight in wanted)
        if len({target.name for target in given}) < len(given) or wanted[0][0] in self.aliases:
            self.refused(InvalidRequestError, self.registry.aliases.set, alias, given)
        elif any(name in self.aliases or self.digest(name, number) is None for name, number, _ in wanted):
            self.refused(LoraplexError, self.registry.aliases.set, alias, given)
        elif alias in self.names:
            self.refused(AlreadyExistsError, self.registry.aliases.set, alias, given)
        else:
            before, _ = self.aliases.get(alias, ((), ()))
            assert self.registry.aliases.set(alias, given) == self.as_targets(before)
            if self.as_targets(wanted) != self.as_targets(before):
                self.aliases[alias] = (wanted, before)

    def as_targets(self, given: Targets) -> tuple[AliasTarget, ...]:
        alone = len(given) == 1
        return tuple(AliasTarget(text(name, number), 1.0 if alone else weight) for name, number, weight in given)

    @rule(alias=names)
    def rollback(self, alias: str) -> None:
        if alias not in self.aliases:
            self.refused(NotFoundError, self.registry.aliases.rollback, alias)
            return
        now, before = self.aliases[alias]
        if not before or any(self.digest(name, number) is None for name, number, _ in before):
            self.refused(PreconditionError, self.registry.aliases.rollback, alias)
        else:
            assert self.registry.aliases.rollback(alias) == self.as_targets(before)
            self.aliases[alias] = (before, now)

    @rule(alias=names)
    def delete_alias(self, alias: str) -> None:
        if alias in self.aliases:
            self.registry.aliases.delete(alias)
            del self.aliases[alias]
        else:
            self.refused(NotFoundError, self.registry.aliases.delete, alias)

    @rule(name=names, number=numbers)
    def pin(self, name: str, number: int | None) -> None:
        if name in self.aliases:
            return
        if self.digest(name, number) is None:
            self.refused(NotFoundError, self.registry.pins.add, text(name, number))
        else:
            self.registry.pins.add(text(name, number))
            self.pins.add((name, number))

    @rule(name=names, number=numbers)
    def unpin(self, name: str, number: int | None) -> None:
        if name in self.aliases:
            return
        digest = self.digest(name, number)
        if digest is None:
            self.refused(NotFoundError, self.registry.pins.remove, text(name, number))
        else:
            self.registry.pins.remove(text(name, number))
            self.pins = {pin for pin in self.pins if pin[0] != name or self.digest(*pin) != digest}

    @rule()
    def restart(self) -> None:
        self.registry.close()
        self.active.clear()
        self.open()

    def named(self) -> set[str]:
        return {digest for known in self.names.values() for digest in known.versions.values()}

    @invariant()
    def names_mean_what_the_model_says(self) -> None:
        records = {record.name: record for record in self.registry.list().records}
        assert set(records) == set(self.names)
        for name, record in records.items():
            known = self.names[name]
            assert {v.number: v.digest for v in record.adapter.versions} == known.versions
            assert record.digest == known.current
            assert record.metadata == known.metadata
            pointing = sorted(a for a, (now, _) in self.aliases.items() if name in {target for target, _, _ in now})
            assert record.aliases == tuple(pointing)
            assert record.active_requests == self.active[record.digest]
            usage = record.usage
            counted = (usage.requests, usage.prompt_tokens, usage.generation_tokens)
            assert counted == (known.requests, 2 * known.requests, 3 * known.requests)
        tagged = self.registry.list(AdapterFilter(tags=("x",))).records
        assert [r.name for r in tagged] == sorted(n for n, known in self.names.items() if "x" in known.metadata.tags)
        assert self.registry.pins.digests == {self.digest(*pin) for pin in self.pins}

    @invariant()
    def only_needed_weights_are_kept(self) -> None:
        self.registry.check_integrity()
        stored = {"sha256:" + path.name for path in (self.tmp / "root" / "store" / "sha256").iterdir()}
        assert stored == self.named() | set(+self.active)
        assert list((self.tmp / "root" / "store" / "staging").iterdir()) == []


TestRegistryModel = RegistryMachine.TestCase
TestRegistryModel.settings = settings(deadline=None, max_examples=25, stateful_step_count=25)
