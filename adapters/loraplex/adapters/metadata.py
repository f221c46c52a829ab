"""What is told about an adapter beside its content: kept with the name, changed without a new version.

Checks lengths only; `default_sampling` is checked by those who know what sampling is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from loraplex.adapters.errors import FieldViolation, InvalidRequestError

MAX_DESCRIPTION = 10_000
MAX_OWNER = 200
MAX_TAG = 100
MAX_TAGS = 50


@dataclass(frozen=True)
class Metadata:
    """What is known about a name.

    Attributes:
        tags: sorted, each once.
        default_sampling: what a request that leaves a field unset gets, by the field's name in
            `loraplex.v1.SamplingParameters`; plain JSON values.
    """

    description: str = ""
    tags: tuple[str, ...] = ()
    owner: str = ""
    default_sampling: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class MetadataChange:
    """What is to change; None leaves a field as it is. `tags` and `default_sampling` replace all that was there."""

    description: str | None = None
    tags: tuple[str, ...] | None = None
    owner: str | None = None
    default_sampling: Mapping[str, Any] | None = None

    def applied_to(self, metadata: Metadata) -> Metadata:
        """Return `metadata` with the change made.

        Raises:
            InvalidRequestError: naming every field that is too long, or an empty tag.
        """
        self._check()
        tags = metadata.tags if self.tags is None else tuple(sorted(set(self.tags)))
        return Metadata(
            metadata.description if self.description is None else self.description,
            tags,
            metadata.owner if self.owner is None else self.owner,
            metadata.default_sampling if self.default_sampling is None else self.default_sampling,
        )

    def _check(self) -> None:
        tags = self.tags or ()
        checks = (
            ("description", len(self.description or "") <= MAX_DESCRIPTION, f"at most {MAX_DESCRIPTION} characters"),
            ("owner", len(self.owner or "") <= MAX_OWNER, f"at most {MAX_OWNER} characters"),
            ("tags", len(tags) <= MAX_TAGS, f"at most {MAX_TAGS} of them"),
            ("tags", all(0 < len(tag) <= MAX_TAG for tag in tags), f"each has 1 to {MAX_TAG} characters"),
        )
        bad = [FieldViolation(name, problem) for name, ok, problem in checks if not ok]
        if bad:
            raise InvalidRequestError(bad)
