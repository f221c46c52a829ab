"""The demo model with sixteen adapters in one batch gives, token by token, what PEFT gives one at a time.

PEFT is not made to generate 18 times 64 tokens: for greedy decoding it is enough to feed it our whole text once and
ask at each position which token it would have chosen after that very prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from loraplex.server.config import EngineConfig
from loraplex.server.engine.request import GenerationRequest, SamplingParams
from loraplex.server.models.loader import load_model
from loraplex.server.tokenizer import Tokenizer
from tests.parity.engine_runs import Recorder, bound_adapters, running_engine
from tests.parity.peft_adapters import RandomAdapter, active, save_random_adapters

pytestmark = pytest.mark.slow

ADAPTERS = tuple(RandomAdapter(f"random-{i}", (8, 16, 32, 64)[i % 4], strength=0.3) for i in range(16))
PROMPT = "The old lighthouse keeper opened the door and saw"
OTHER_PROMPT = "def fibonacci(n):\n    "
NEW_TOKENS = 64
SOON = 16
# Two logits this close may be rounded into either order.
NEAR_TIE = 1e-3


@dataclass(frozen=True)
class Row:
    """One request's part of the batch; `adapter` None is the base."""

    name: str
    adapter: RandomAdapter | None
    prompt: tuple[int, ...]


@dataclass(frozen=True)
class Batched:
    """What one engine gave for all rows together."""

    rows: tuple[Row, ...]
    texts: dict[str, list[int]]
    recorder: Recorder


@pytest.fixture(scope="module")
def tokenizer(demo_path: Path) -> Tokenizer:
    return Tokenizer.load(demo_path)


@pytest.fixture(scope="module")
def adapter_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def peft(demo_path: Path, adapter_folder: Path) -> PeftModel:
    """The demo model in fp32 as transformers has it, with all adapters, which also lie in `adapter_folder`."""
    model = AutoModelForCausalLM.from_pretrained(demo_path, dtype=torch.float32)
    return save_random_adapters(model, ADAPTERS, adapter_folder)


@pytest.fixture(scope="module")
def batched(demo_path: Path, tokenizer: Tokenizer, peft: PeftModel, adapter_folder: Path) -> Batched:
    model = load_model(str(demo_path), dtype="float32")
    bound = bound_adapters({adapter.name: adapter_folder / adapter.name for adapter in ADAPTERS}, model.base)
    digests = {name: adapter.digest for name, adapter in bound.items()}
    by_digest = {adapter.digest: adapter for adapter in bound.values()}
    prompt, other = (tuple(tokenizer.encode(text)) for text in (PROMPT, OTHER_PROMPT))
    rows = (
        *(Row(adapter.name, adapter, prompt) for adapter in ADAPTERS),
        Row("base", None, prompt),
        Row("base on another prompt", None, other),
    )
    params = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True, seed=0)
    config = EngineConfig(kv_cache_memory=128 * 2**20, max_model_len=256)
    with running_engine(model, tokenizer, config, by_digest.__getitem__) as run:
        run.make_resident(list(by_digest))
        run.finish(
            *(GenerationRequest(row.name, row.prompt, params, adapter_digest=digests.get(row.name)) for row in rows)
        )
        return Batched(rows, {row.name: run.outputs.tokens(row.name) for row in rows}, run.recorder)


def solo_logits(peft: PeftModel, row: Row, text: Sequence[int]) -> torch.Tensor:
    """Return what PEFT has after prompt + text[:i], for each i: (len(text), vocab)."""
    with active(peft, row.adapter) as model:
        logits = model(torch.tensor([[*row.prompt, *text]])).logits[0]
    return logits[len(row.prompt) - 1 : -1]


def test_sixteen_adapters_and_the_base_share_every_step(batched: Batched) -> None:
    assert [step.num_rows for step in batched.recorder.steps] == [len(batched.rows)] * NEW_TOKENS
    assert {step.num_adapters for step in batched.recorder.steps} == {len(ADAPTERS)}


def test_every_row_has_its_own_text(batched: Batched) -> None:
    texts = {row.name: batched.texts[row.name][:SOON] for row in batched.rows if row.prompt == batched.rows[0].prompt}
    assert len(texts) == len(ADAPTERS) + 1
    same = [(a, b) for a, b in combinations(texts, 2) if texts[a] == texts[b]]
    assert not same, "adapters that change nothing prove nothing"


def test_batched_rows_are_what_peft_gives_solo(batched: Batched, peft: PeftModel) -> None:
    partings = []
    for row in batched.rows:
        text = batched.texts[row.name]
        assert len(text) == NEW_TOKENS
        logits = solo_logits(peft, row, text)
        best = logits.max(dim=-1).values
        ours = logits.gather(-1, torch.tensor(text)[:, None])[:, 0]
        gaps = best - ours
        assert gaps.max() < NEAR_TIE, f"{row.name} parts at {int(gaps.argmax())} by {float(gaps.max())}"
        partings += [float(gap) for gap in gaps if gap > 0]
    # Every one was a near-tie; many of them would mean logits that are less exact than they look.
    assert len(partings) <= 4, partings


def test_peft_generating_by_itself_gives_the_same(batched: Batched, peft: PeftModel) -> None:
    """Holds the shortcut of the test above against the real thing, for one adapter."""
    row = batched.rows[3]
    text = batched.texts[row.name]
    with active(peft, row.adapter) as model:
        whole = model.generate(
            input_ids=torch.tensor([row.prompt]),
            attention_mask=torch.ones(1, len(row.prompt), dtype=torch.int64),
            do_sample=False,
            min_new_tokens=NEW_TOKENS,
            max_new_tokens=NEW_TOKENS,
            pad_token_id=0,
        )
    theirs = whole[0, len(row.prompt) :].tolist()
    parting = next((i for i, (a, b) in enumerate(zip(text, theirs, strict=True)) if a != b), None)
    if parting is not None:
        logits = solo_logits(peft, row, text)[parting]
        assert abs(logits[text[parting]] - logits[theirs[parting]]) < NEAR_TIE
