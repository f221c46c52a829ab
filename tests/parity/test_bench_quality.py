"""Perplexities and divergences of `loraplex bench quality` against transformers' own, on a tiny model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from loraplex.bench.quality import ROWS, Tally
from loraplex.bench.text import fixed_text, windows
from loraplex.cli.main import app
from loraplex.server.tokenizer import Tokenizer
from tests.integration.serving import write_model

LENGTH = 24


def test_float32_is_transformers_and_fewer_bits_diverge_more(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    output = tmp_path / "quality.json"
    options = ["--model", str(model), "--tokens", str(LENGTH), "--json", str(output)]
    result = CliRunner().invoke(app, ["bench", "quality", *options])
    assert result.exit_code == 0, result.output
    document = json.loads(output.read_text())
    by_name = {each["name"]: each for each in document["qualities"]}
    assert set(by_name) == {"float32", "none", "int8", "nf4"}
    tokens = torch.tensor(windows(Tokenizer.load(model).encode(fixed_text()), ROWS, LENGTH))
    with torch.inference_mode():
        loss = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(tokens, labels=tokens).loss
    assert by_name["float32"]["perplexity"] == pytest.approx(math.exp(loss), rel=1e-3)
    assert document["tokens"] == ROWS * (LENGTH - 1)
    assert by_name["float32"]["kl"] == 0.0
    assert by_name["float32"]["same_choice"] == 1.0
    assert 0 < by_name["int8"]["kl"] < by_name["nf4"]["kl"]
    for each in by_name.values():
        assert each["of_exact"] == pytest.approx(each["perplexity"] / by_name["float32"]["perplexity"])


def test_divergence_is_the_sum_over_the_vocabulary() -> None:
    p, q = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[2.0, 1.0, 0.5]])
    tally = Tally()
    tally.add(q, p, torch.tensor([2]))
    expected = torch.nn.functional.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="sum")
    assert tally.kl == pytest.approx(float(expected))
    assert tally.loss == pytest.approx(float(torch.nn.functional.cross_entropy(q, torch.tensor([2]))))
    assert tally.same == 0


def test_windows_lie_apart_and_need_enough_text() -> None:
    assert windows(list(range(10)), 2, 3) == [[0, 1, 2], [5, 6, 7]]
    with pytest.raises(ValueError, match="need 12"):
        windows(list(range(10)), 4, 3)
