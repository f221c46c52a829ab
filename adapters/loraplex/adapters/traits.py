"""What the server must know of an adapter version before its weights are loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class AdapterTraits:
    """How an adapter wants to be used; stored with its version.

    Attributes:
        kind: "lora", "dora" or "alora".
        fixed_scale: whether it holds for its own scaling only, so that another `adapter_scale` is refused (DoRA).
        invocation_tokens: where they last stand in a prompt, the adapter begins to act (aLoRA); empty: everywhere.
    """

    kind: str = "lora"
    fixed_scale: bool = False
    invocation_tokens: tuple[int, ...] = ()

    def start_in(self, prompt_token_ids: Sequence[int]) -> int | None:
        """Return the first prompt token on which the adapter acts.

        0 for an ordinary adapter; for aLoRA where the last occurrence of `invocation_tokens` begins, or None if there
        is none: the base alone then answers (PEFT, `calculate_alora_offsets`).
        """
        if not self.invocation_tokens:
            return 0
        return _last_start(self.invocation_tokens, prompt_token_ids)

    def to_json(self) -> dict[str, Any]:
        """Return plain values for the catalog."""
        tokens = list(self.invocation_tokens)
        return {"kind": self.kind, "fixed_scale": self.fixed_scale, "invocation_tokens": tokens}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> AdapterTraits:
        """Undo `to_json`; what is missing takes its default."""
        known = {**cls().to_json(), **values}
        return cls(known["kind"], known["fixed_scale"], tuple(known["invocation_tokens"]))


def _last_start(pattern: Sequence[int], tokens: Sequence[int]) -> int | None:
    """Return where `pattern` last occurs in `tokens`, in a time that grows with their lengths, not with the product.

    Knuth, Morris and Pratt 1977, from the end to the beginning: both come from others.
    """
    pattern = pattern[::-1]
    # How much of the pattern still fits after its first `i + 1` tokens did and the next one did not.
    borders = [0] * len(pattern)
    fits = 0
    for i in range(1, len(pattern)):
        while fits and pattern[i] != pattern[fits]:
            fits = borders[fits - 1]
        fits += pattern[i] == pattern[fits]
        borders[i] = fits
    fits = 0
    for start in range(len(tokens) - 1, -1, -1):
        while fits and tokens[start] != pattern[fits]:
            fits = borders[fits - 1]
        fits += tokens[start] == pattern[fits]
        if fits == len(pattern):
            return start
    return None
