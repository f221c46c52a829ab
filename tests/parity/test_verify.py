"""`loraplex adapter verify`: passes for a server that computes what PEFT computes, and fails for one that does not."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from loraplex.adapters import merge, reference
from loraplex.adapters.verify import (
    LOGITS,
    LOGPROBS,
    ServedAnswer,
    ServedPosition,
    VerifyJob,
    served_difference,
    verify,
)
from loraplex.cli import verify_run
from loraplex.cli.main import app
from loraplex.client import Client, SamplingOptions
from loraplex.server.config import ModelConfig
from tests.integration.serving import CONTEXT, Folders, RunningServer, fitting_adapter, write_model
from tests.parity.merge_models import LLAMA_TARGETS, load, logits, make_adapter, make_base


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    root = tmp_path_factory.mktemp("verify")
    folders = Folders(write_model(root / "model"), root / "adapters", root / "state", root / "export")
    folders.adapters.mkdir()
    folders.export.mkdir()
    return folders


@pytest.fixture(scope="module", params=["none", "nf4"])
def server(request: pytest.FixtureRequest, folders: Folders) -> Iterator[RunningServer]:
    model = ModelConfig(str(folders.model), quantization=request.param, dtype="float32")
    state = folders.state / request.param
    with RunningServer(folders, model=model, state_dir=state) as running, running.client() as client:
        for seed, name in enumerate(("alpha", "beta", "gamma")):
            folder = folders.adapters / name
            client.register_adapter(name, folder if folder.exists() else fitting_adapter(folder, seed=seed + 1))
        yield running


OWN_SAMPLING = SamplingOptions(
    temperature=1.0,
    top_p=0.5,
    top_k=3,
    min_p=0.5,
    repetition_penalty=1.9,
    presence_penalty=1.5,
    frequency_penalty=1.5,
    n=2,
)


def test_a_right_server_passes_whatever_the_adapters_own_sampling(server: RunningServer, tmp_path: Path) -> None:
    prompts = ("The quick brown fox", "jumps over")
    (tmp_path / "prompts").write_text("\n".join(prompts))
    greedy = replace(verify_run.GREEDY, max_tokens=8)
    with server.client() as client:
        tokens = client.generate(prompts[0], "alpha", sampling=greedy).choices[0].token_ids
        own = replace(OWN_SAMPLING, stop_token_ids=[tokens[4]])
        client.update_adapter("alpha", default_sampling=own)
        answers = [client.generate(prompt, "alpha", sampling=greedy) for prompt in prompts]
    positions = sum(len(answer.choices[0].token_ids) for answer in answers)
    assert positions < 16
    arguments = ["adapter", "verify", "alpha", "--server", server.target, "--prompts", str(tmp_path / "prompts")]
    result = CliRunner().invoke(app, [*arguments, "--max-tokens", "8", "--json"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["passed"]
    assert told["beside"] == ["the base", "beta", "gamma"]
    assert told["quantization"] == server.config.model.quantization
    assert [pair["pair"] for pair in told["pairs"]] == ["PEFT and server", "merged and server", "PEFT and merged"]
    assert [pair["measure"] for pair in told["pairs"]] == [LOGPROBS, LOGPROBS, LOGITS]
    for pair in told["pairs"]:
        assert pair["positions"] == positions
        assert pair["top1_agreement"] == 1.0
        assert pair["max_difference"] < 1e-3
        assert pair["mean_kl"] < 1e-6


def test_a_context_without_room_for_a_prompt_is_told(server: RunningServer) -> None:
    arguments = ["adapter", "verify", "alpha", "--server", server.target, "--max-tokens", str(CONTEXT)]
    result = CliRunner().invoke(app, arguments)
    assert (result.exit_code, "max_tokens" in result.stderr) == (1, True)


def test_another_adapters_answers_fail(folders: Folders, tmp_path: Path) -> None:
    """What PEFT and the merged model say of alpha, against answers that gamma gave."""
    with RunningServer(folders, state_dir=tmp_path / "state") as running, running.client() as client:
        client.register_adapter(
            "alpha", fitting_adapter(tmp_path / "gamma", seed=77).rename(folders.adapters / "wrong")
        )
        answers = served(running.target, "alpha", client)
        truth = fitting_adapter(tmp_path / "alpha", seed=1)
        found = verify(VerifyJob(folders.model, truth, None, answers, tmp_path), lambda *step: None)
    limits = verify_run.Limits(0.01, 0.95)
    assert [limits.hold_for(pair) for pair in found.pairs] == [False, False, True]
    assert found.pairs[0].mean_kl > 0.1


def served(target: str, name: str, client: Client) -> tuple[ServedAnswer, ...]:
    generation = client.generate([5, 9, 12, 40], name, max_tokens=6, ignore_eos=True, logprobs=20)
    (choice,) = generation.choices
    positions = tuple(
        ServedPosition(token, tuple((each.token_id, each.logprob) for each in position.top))
        for token, position in zip(choice.token_ids, choice.logprobs, strict=True)
    )
    return (ServedAnswer((5, 9, 12, 40), positions),)


def test_what_is_compared_is_every_position(tmp_path: Path) -> None:
    torch.manual_seed(0)
    rows = torch.randn(3, 50)
    logprobs = rows.log_softmax(-1)
    exact = tuple(
        ServedPosition(int(row.argmax()), tuple((int(t), float(row[t])) for t in row.topk(20).indices))
        for row in logprobs
    )
    answer = ServedAnswer((1, 2), exact)
    assert answer.sequence == [1, 2, exact[0].token, exact[1].token]
    same = served_difference("pair", [answer], [rows])
    assert (same.top1_agreement, same.positions) == (1.0, 3)
    assert same.max_difference < 1e-6
    assert abs(same.mean_kl) < 1e-9
    # One position has another token and other probabilities.
    shifted = ServedPosition(exact[1].top[1][0], tuple((token, logprob - 0.5) for token, logprob in exact[1].top))
    off = served_difference("pair", [ServedAnswer((1, 2), (exact[0], shifted, exact[2]))], [rows])
    assert off.top1_agreement == pytest.approx(2 / 3)
    assert off.max_difference == pytest.approx(0.5, abs=1e-6)
    mass = sum(math.exp(logprob) for _, logprob in exact[1].top)
    rest = (1 - mass) * math.log((1 - mass) / (1 - mass * math.exp(-0.5)))
    assert off.mean_kl == pytest.approx((mass * 0.5 + rest) / 3, abs=1e-6)


def test_jobs_survive_json() -> None:
    answers = (ServedAnswer((1, 2), (ServedPosition(3, ((3, -0.5), (4, -2.0))),)),)
    job = VerifyJob(Path("m"), Path("a"), "nf4", answers, Path("s"))
    assert VerifyJob.from_json(json.loads(json.dumps(job.to_json()))) == job


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_reference_is_transformers(tmp_path: Path, family: str) -> None:
    base = make_base(tmp_path / "base", family)
    torch.testing.assert_close(logits(reference.plain_model(base)), logits(load(base)), atol=1e-6, rtol=0)


def test_an_alora_is_compared_without_a_merged_model(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama")
    adapter = make_adapter(base, tmp_path / "adapter", LLAMA_TARGETS, alora_invocation_tokens=[7, 8])
    model: Any = reference.adapted_model(base, adapter, None)
    rows = reference.logits(model, [3, 7, 8, 9]).log_softmax(-1)[-1]
    position = ServedPosition(int(rows.argmax()), tuple((int(t), float(rows[t])) for t in rows.topk(20).indices))
    job = VerifyJob(base, adapter, None, (ServedAnswer((3, 7, 8, 9), (position,)),), tmp_path)
    found = verify(job, lambda *step: None)
    assert "aLoRA" in found.not_merged
    (pair,) = found.pairs
    assert pair.max_difference < 1e-5


def test_a_full_disk_keeps_what_is_compared_already(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_base(tmp_path / "base", "llama")
    adapter = make_adapter(base, tmp_path / "adapter", ["q_proj"])
    monkeypatch.setattr(merge, "free_bytes", lambda folder: 1000)
    answer = ServedAnswer((3, 7), (ServedPosition(9, ((9, -0.5), (4, -2.0))),))
    found = verify(VerifyJob(base, adapter, None, (answer,), tmp_path), lambda *step: None)
    assert [pair.pair for pair in found.pairs] == ["PEFT and server"]
    assert "bytes" in found.not_merged
