"""Every format that PEFT writes, in one batch of the real engine: token by token what PEFT gives each one alone.

Tiny models in fp32. The formats of one model share every step with each other, with plain adapters and with rows of the
base. For greedy decoding it is enough to feed PEFT our whole text once and ask at each position which token it would
have chosen after that very prefix.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from loraplex.adapters.binding import BoundAdapter
from loraplex.server.config import EngineConfig
from loraplex.server.engine.request import GenerationRequest, SamplingParams
from loraplex.server.models.loader import LoadedModel, load_model
from tests.parity.engine_runs import EngineRun, bound_adapters, running_engine
from tests.parity.peft_formats import FORMATS, INVOCATION, tiny_base
from tests.unit.fakes import byte_tokenizer

NEW_TOKENS = 36
# Two logits this close may be rounded into either order.
NEAR_TIE = 1e-3
# Holds every token that a format trains, and the invocation of aLoRA twice.
PROMPT = (3, 9, *INVOCATION, 14, 5, 22, *INVOCATION, 7, 4, 6)
UNINVOKED = (6, 9, 3, 14, 22, 5, 40, 4, 7, 31, 12)
CONFIG = EngineConfig(
    max_num_seqs=128,
    block_size=4,
    max_num_batched_tokens=4096,
    kv_cache_memory=2**24,
    max_model_len=64,
    adapter_device_memory=2**30,
    adapter_host_memory=2**30,
)


@dataclass(frozen=True)
class Row:
    """One request of the batch; `name` is its adapter's, or starts with "base"."""

    name: str
    prompt: tuple[int, ...]


@dataclass(frozen=True)
class Batched:
    """What one engine gave for all rows together, and what PEFT needs to judge it."""

    reference: PreTrainedModel
    folders: Mapping[str, Path]
    bound: Mapping[str, BoundAdapter]
    texts: Mapping[Row, list[int]]
    shared_steps: int


def rows_of(bound: Mapping[str, BoundAdapter]) -> list[Row]:
    invoked = [name for name, adapter in bound.items() if adapter.traits.invocation_tokens]
    return [
        Row("base", PROMPT),
        *(Row(name, PROMPT) for name in bound),
        *(Row(name, UNINVOKED) for name in invoked),
        Row("base uninvoked", UNINVOKED),
    ]


def request(row: Row, number: int, adapter: BoundAdapter | None) -> GenerationRequest:
    params = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True, seed=0)
    if adapter is None:
        return GenerationRequest(str(number), row.prompt, params)
    start = adapter.traits.start_in(row.prompt)
    return GenerationRequest(str(number), row.prompt, params, adapter_digest=adapter.digest, adapter_start=start)


def run_together(run: EngineRun, rows: list[Row], bound: Mapping[str, BoundAdapter]) -> dict[Row, list[int]]:
    # What an aLoRA may take over of the base's blocks is then in the cache.
    run.finish(request(rows[0], -1, None))
    run.make_resident([adapter.digest for adapter in bound.values()])
    run.finish(*(request(row, number, bound.get(row.name)) for number, row in enumerate(rows)))
    return {row: run.outputs.tokens(str(number)) for number, row in enumerate(rows)}


def run_model(name: str, folder: Path) -> Batched:
    reference = tiny_base(name, folder / "base")
    folders = {made.name: folder / made.name for made in FORMATS[name]}
    for made in FORMATS[name]:
        made.save(reference, folders[made.name])
    model: LoadedModel = load_model(str(folder / "base"), dtype="float32")
    bound = bound_adapters(folders, model.base)
    by_digest = {adapter.digest: adapter for adapter in bound.values()}
    rows = rows_of(bound)
    with running_engine(model, byte_tokenizer(), CONFIG, by_digest.__getitem__) as run:
        texts = run_together(run, rows, bound)
        run.check_integrity()
        shared = sum(step.num_rows == len(rows) for step in run.recorder.steps)
    return Batched(reference, folders, bound, texts, shared)


@pytest.fixture(scope="module", params=sorted(FORMATS))
def batched(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Batched:
    return run_model(request.param, tmp_path_factory.mktemp(request.param))


def test_all_rows_share_every_step(batched: Batched) -> None:
    assert batched.shared_steps == NEW_TOKENS


def test_every_format_has_a_text_of_its_own(batched: Batched) -> None:
    texts = {row.name: text for row, text in batched.texts.items() if row.prompt == PROMPT}
    assert len(texts) == len(batched.bound) + 1
    if batched.reference.config.model_type == "gemma2" and batched.reference.config.tie_word_embeddings:
        pytest.skip("its large embeddings are its lm_head: whatever the adapter, it repeats one token")
    same = [(a, b) for a, b in combinations(texts, 2) if texts[a] == texts[b]]
    assert not same, "adapters that change nothing prove nothing"


def test_without_its_invocation_an_alora_is_the_base(batched: Batched) -> None:
    texts = {row.name: text for row, text in batched.texts.items() if row.prompt == UNINVOKED}
    base = texts.pop("base uninvoked")
    assert len(texts) == sum(made.traits.kind == "alora" for made in batched.bound.values())
    assert all(text == base for text in texts.values())


def peft_choices(batched: Batched, row: Row, text: list[int]) -> torch.Tensor:
    """Return the logits that PEFT has after prompt + text[:i], for each i: (len(text), vocab)."""
    model: nn.Module = batched.reference
    if row.name in batched.folders:
        model = PeftModel.from_pretrained(copy.deepcopy(batched.reference), str(batched.folders[row.name])).eval()
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=torch.tensor([[*row.prompt, *text]])).logits[0]
    return logits[len(row.prompt) - 1 : -1]


def test_batched_rows_are_what_peft_gives_alone(batched: Batched) -> None:
    partings = []
    for row, text in batched.texts.items():
        assert len(text) == NEW_TOKENS
        if row.name in batched.bound and batched.bound[row.name].traits.invocation_tokens:
            # PEFT would take an invocation in our text for the one that counts.
            assert not any(tuple(text[i : i + len(INVOCATION)]) == INVOCATION for i in range(NEW_TOKENS)), row
        logits = peft_choices(batched, row, text)
        chosen = logits.gather(-1, torch.tensor(text)[:, None])[:, 0]
        behind = logits.max(dim=-1).values - chosen
        partings += [(row.name, i, gap) for i, gap in enumerate(behind.tolist()) if gap >= NEAR_TIE]
    assert not partings, f"{len(partings)} tokens are not PEFT's: {partings[:8]}"
