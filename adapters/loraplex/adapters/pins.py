"""Which adapters' weights are to stay on the device: kept with the names, so that a pin outlives a restart.

A pin is on a name and follows it from version to version, or on one version. Knows the catalog and who may write.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

from loraplex.adapters.catalog import Catalog
from loraplex.adapters.errors import PreconditionError
from loraplex.adapters.names import parse_selector


class Pins:
    """The pins of one catalog; `writing` lets one thread at a time change it, `problem_of` judges a digest."""

    def __init__(
        self,
        catalog: Catalog,
        writing: Callable[[], AbstractContextManager[None]],
        problem_of: Callable[[str], str],
    ) -> None:
        self._catalog = catalog
        self._writing = writing
        self._problem_of = problem_of

    @property
    def digests(self) -> frozenset[str]:
        """What is to stay on the device and can be used."""
        return frozenset(d for d in self._catalog.directory.pinned_digests if not self._problem_of(d))

    def add(self, selector: str) -> None:
        """Pin a name, or one of its versions; an alias stands for what it points at now.

        Raises:
            NotFoundError: nothing has that name.
            PreconditionError: it is registered but cannot serve requests.
        """
        with self._writing():
            now = self._catalog.directory
            adapter, version = now.require(selector)
            problem = self._problem_of(version.digest)
            if problem:
                raise PreconditionError(f"{selector} cannot be used: {problem}")
            follows = parse_selector(selector).is_bare and version == adapter.current
            self._catalog.set_pins(now.pins | {(adapter.name, 0 if follows else version.number)})

    def remove(self, selector: str) -> None:
        """Take every pin away that keeps this version of this name on the device.

        Raises:
            NotFoundError: nothing has that name.
        """
        with self._writing():
            now = self._catalog.directory
            adapter, version = now.require(selector)
            numbers = {v.number for v in adapter.versions if v.digest == version.digest}
            if version.digest == adapter.current.digest:
                numbers.add(0)
            self._catalog.set_pins(now.pins - {(adapter.name, number) for number in numbers})
