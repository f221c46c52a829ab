"""Makes, moves and removes aliases, by the rules: a target is registered and no alias itself, no name means two things.

Knows the catalog and who may write; nothing about weights or requests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

from loraplex.adapters.alias import Alias, AliasTarget, checked_targets
from loraplex.adapters.catalog import Catalog
from loraplex.adapters.errors import AlreadyExistsError, NotFoundError, PreconditionError
from loraplex.adapters.names import check_name, parse_selector


class AliasBook:
    """The aliases of one catalog; `writing` lets one thread at a time change it."""

    def __init__(self, catalog: Catalog, writing: Callable[[], AbstractContextManager[None]]) -> None:
        self._catalog = catalog
        self._writing = writing

    def set(self, alias: str, targets: Iterable[AliasTarget]) -> tuple[AliasTarget, ...]:
        """Make `alias` point at `targets` in one step; return what it pointed at before.

        Raises:
            InvalidRequestError: the alias is not an allowed name, or the targets are not (one is itself an alias, say).
            NotFoundError: a target is not registered.
            AlreadyExistsError: an adapter has the alias as its name.
        """
        check_name(alias, "alias")
        wanted = checked_targets(targets)
        with self._writing():
            now = self._catalog.directory
            for target in wanted:
                now.adapter(parse_selector(target.name).name)
                now.require(target.name)
            if alias in now.names:
                raise AlreadyExistsError(f"{alias} is the name of an adapter; choose another alias")
            known = now.aliases.get(alias)
            self._catalog.set_alias(known.moved(wanted) if known else Alias(alias, wanted))
        return known.targets if known else ()

    def rollback(self, alias: str) -> tuple[AliasTarget, ...]:
        """Give `alias` back what it pointed at before its last change, and return that; again takes it back.

        Raises:
            NotFoundError: there is no such alias.
            PreconditionError: it has pointed at nothing else, or that is not registered any more.
        """
        with self._writing():
            known = self._known(alias)
            if not known.previous:
                raise PreconditionError(f"{alias} has not pointed at anything else; set it instead")
            missing = [t.name for t in known.previous if self._catalog.directory.find(t.name) is None]
            if missing:
                raise PreconditionError(f"{alias} pointed at {', '.join(missing)}, which is not registered any more")
            self._catalog.set_alias(known.moved(known.previous))
        return known.previous

    def delete(self, alias: str) -> None:
        """Take `alias` away; the adapter stays.

        Raises:
            NotFoundError: there is no such alias.
        """
        with self._writing():
            self._known(alias)
            self._catalog.delete_alias(alias)

    def _known(self, alias: str) -> Alias:
        known = self._catalog.directory.aliases
        if alias not in known:
            some = ", ".join(sorted(known)[:5]) or "none"
            raise NotFoundError(f"there is no alias {alias!r:.140} (known: {some})")
        return known[alias]
