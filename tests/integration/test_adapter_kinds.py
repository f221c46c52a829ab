"""Adapters that want to be used in their own way, through a real server: DoRA's scale, aLoRA's invocation."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from loraplex.client import Client
from loraplex.client.errors import InvalidRequestError
from tests.adapter_factory import tensors, write_adapter
from tests.integration.serving import RunningServer, base_of_model

PROMPT = [40, 41, 42, 43, 44, 45]
INVOCATION = [50, 51]


@pytest.fixture
def kinds(server: RunningServer, client: Client) -> Iterator[Client]:
    """A client of a server that has an adapter `dora` and an adapter `activated`."""
    base, root = base_of_model(), server.folders.adapters
    weights = tensors(base, seed=21)
    magnitudes = {
        key.replace("lora_B.weight", "lora_magnitude_vector"): 1 + torch.rand(len(tensor))
        for key, tensor in weights.items()
        if key.endswith("lora_B.weight")
    }
    client.register_adapter("dora", write_adapter(root / "dora", weights=weights | magnitudes, use_dora=True))
    client.register_adapter(
        "activated", write_adapter(root / "activated", weights=weights, alora_invocation_tokens=INVOCATION)
    )
    yield client
    client.unregister_adapter("dora")
    client.unregister_adapter("activated")


def answer(client: Client, prompt: list[int], adapter: str = "") -> tuple[tuple[int, ...], str]:
    generation = client.generate(prompt, adapter, max_tokens=8, ignore_eos=True)
    return generation.choices[0].token_ids, generation.adapter_digest


def test_dora_is_served_at_its_own_scale_only(kinds: Client) -> None:
    tokens, digest = answer(kinds, PROMPT, "dora")
    assert digest == kinds.get_adapter("dora").digest
    assert tokens != answer(kinds, PROMPT)[0]
    with pytest.raises(InvalidRequestError) as raised:
        kinds.generate(PROMPT, "dora", scale=0.5)
    (violation,) = raised.value.violations
    assert violation.field == "adapters.scale"
    assert "must be 1" in violation.description


def test_an_activated_adapter_answers_where_it_is_invoked(kinds: Client) -> None:
    invoked = [*PROMPT, *INVOCATION, 46]
    tokens, digest = answer(kinds, invoked, "activated")
    assert digest == kinds.get_adapter("activated").digest
    assert tokens != answer(kinds, invoked)[0]


def test_an_adapter_that_is_not_invoked_leaves_the_answer_to_the_base(kinds: Client) -> None:
    assert answer(kinds, PROMPT, "activated") == (answer(kinds, PROMPT)[0], "")
