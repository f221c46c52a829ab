"""MergeAdapter over gRPC: what it writes, what it refuses, and that a merge left early leaves nothing."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from loraplex.client import Client
from loraplex.client.errors import AlreadyExistsError, InvalidRequestError, NotFoundError, PreconditionError
from tests.integration.serving import Folders, RunningServer, eventually


def test_merged_model_answers_like_the_adapter(
    server: RunningServer, client: Client, expected: dict[str, tuple[int, ...]]
) -> None:
    progress = list(client.merge_adapter("alpha", "merged", measure_speed=True, prompts=["The quick", "brown fox"]))
    assert progress[-1].output_path == str(server.folders.export / "merged")
    assert progress[-1].adapter_digest == client.get_adapter("alpha").digest
    assert progress[-1].tensors_done == progress[-1].tensors_total > 0
    phases = [step.phase for step in progress]
    assert list(dict.fromkeys(phases)) == ["merging", "checking", "measuring", ""]
    comparison = progress[-1].comparison
    assert comparison is not None
    assert comparison.positions == len(ids_of(server, "The quick")) + len(ids_of(server, "brown fox"))
    assert (comparison.top1_agreement, comparison.mean_kl < 1e-6) == (1.0, True)
    assert [side.model for side in progress[-1].speed] == ["unmerged", "merged"]
    assert all(side.tokens_per_second > 0 and side.first_token_ms > 0 for side in progress[-1].speed)
    folder = Path(progress[-1].output_path)
    assert not list(folder.glob("adapter_*"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(folder)("The quick brown", return_tensors="pt").input_ids
    with torch.no_grad():
        for _ in range(12):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert tuple(ids[0, -12:].tolist()) == expected["alpha"]
    with pytest.raises(AlreadyExistsError, match="choose another"):
        client.merge_adapter("alpha", "merged").result()


def ids_of(server: RunningServer, text: str) -> list[int]:
    ids: list[int] = AutoTokenizer.from_pretrained(server.folders.model)(text).input_ids
    return ids


def test_several_with_weights(server: RunningServer, client: Client) -> None:
    done = client.merge_adapter({"alpha": 0.5, "beta": 1.5}, "both", quantize="nf4").result()
    assert done.adapter_digests == (client.get_adapter("alpha").digest, client.get_adapter("beta").digest)
    assert done.comparison is not None
    assert done.comparison.mean_kl > 0
    # Quantized it cannot be this close.
    with pytest.raises(PreconditionError, match="too far from base and adapters apart"):
        client.merge_adapter({"alpha": 0.5, "beta": 1.5}, "near", quantize="nf4", max_mean_kl=1e-9).result()
    assert not (server.folders.export / "near").exists()


OUTSIDE = {
    "empty": "",
    "the root": ".",
    "dots": "../escaped",
    "absolute": "/tmp/escaped",
    "link": "link/escaped",
    "no parent": "no/such/parent",
    "zero byte": "a\0b",
    "over-long": "x" * 5000,
}


@pytest.mark.parametrize("case", OUTSIDE)
def test_outputs_that_are_refused(server: RunningServer, client: Client, tmp_path: Path, case: str) -> None:
    link = server.folders.export / "link"
    link.symlink_to(tmp_path)
    try:
        with pytest.raises(InvalidRequestError) as raised:
            client.merge_adapter("alpha", OUTSIDE[case]).result()
    finally:
        link.unlink()
    assert [violation.field for violation in raised.value.violations] == ["output"]
    assert not list(tmp_path.iterdir())


def test_arguments_that_are_refused(client: Client) -> None:
    with pytest.raises(InvalidRequestError, match="scale"):
        client.merge_adapter("alpha", "out", scale=math.nan).result()
    with pytest.raises(InvalidRequestError, match=r"adapters\.weight"):
        client.merge_adapter({"alpha": 1, "beta": math.inf}, "out").result()
    with pytest.raises(InvalidRequestError, match="for a single adapter"):
        client.merge_adapter({"alpha": 1, "beta": 1}, "out", scale=2).result()
    with pytest.raises(InvalidRequestError, match="one name, or several"):
        client.merge_adapter("", "out").result()
    with pytest.raises(NotFoundError):
        client.merge_adapter("none", "out").result()
    with pytest.raises(NotFoundError):
        client.merge_adapter({"alpha": 1, "none": 1}, "out").result()
    with pytest.raises(InvalidRequestError, match="density"):
        client.merge_adapter({"alpha": 1, "beta": 1}, "out", density=0.5).result()
    with pytest.raises(PreconditionError, match="not quantized"):
        client.merge_adapter("alpha", "out", base="dequantized").result()


def test_exports_that_are_off(folders: Folders) -> None:
    with RunningServer(folders, export_root=None) as server, server.client() as client:
        merging = client.merge_adapter("alpha", "out")
        with pytest.raises(PreconditionError, match="--export-root"):
            merging.result()


def test_left_merge_leaves_nothing(server: RunningServer, client: Client) -> None:
    before = set(os.listdir(server.folders.export))
    stream = client.merge_adapter("beta", "left")
    eventually(lambda: client.get_adapter("beta").active_requests == 1, "the merge has begun")
    stream.close()
    eventually(lambda: client.get_adapter("beta").active_requests == 0, "the merge has ended")
    assert set(os.listdir(server.folders.export)) == before
