"""The usage of the registered names, kept in the catalog."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

from loraplex.adapters.catalog import Catalog
from loraplex.adapters.usage import Usage, UsageMeter


class UsageBook:
    """How much each name of one catalog was used; `writing` lets one thread at a time change it. Thread-safe."""

    def __init__(self, catalog: Catalog, writing: Callable[[], AbstractContextManager[None]]) -> None:
        self._catalog = catalog
        self._writing = writing
        self._meter = UsageMeter(catalog.read_usage(), self._save)

    def count(self, name: str, prompt_tokens: int, generation_tokens: int) -> None:
        """Count a request that has ended on `name`; waits for no disk. A name that has gone meanwhile is ignored."""
        if name in self._catalog.directory.names:
            self._meter.count(name, prompt_tokens, generation_tokens)

    def of(self, name: str) -> Usage:
        """Return the usage of `name`."""
        return self._meter.of(name)

    def forget(self, name: str) -> None:
        """Drop the usage of a name that is not registered any more."""
        self._meter.forget(name)

    def close(self) -> None:
        """Save what is not saved yet."""
        self._meter.close()

    def _save(self) -> None:
        # Taken inside, so that a name which is unregistered and registered again meanwhile begins at nothing.
        with self._writing():
            with self._meter.unsaved() as usage:
                names = self._catalog.directory.names
                self._catalog.write_usage({name: used for name, used in usage.items() if name in names})
            for name in usage.keys() - names.keys():
                self._meter.forget(name)
