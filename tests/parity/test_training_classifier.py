"""A classifier on a BERT: trained, merged, and not served."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification
from typer.testing import CliRunner

from loraplex.adapters.errors import AdapterFormatError
from loraplex.adapters.training import train
from loraplex.adapters.training.classifier_merge import merge_classifier
from loraplex.cli.main import app
from tests.parity.training_setup import Watcher, tiny_run
from tests.unit.tiny_tokenizers import byte_level_fast, wrap

ROWS = [{"text": f"The {word} of row {n}.", "label": word} for n in range(30) for word in ("quick", "lazy")]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    tokenizer = wrap(byte_level_fast(), chat_template=None)
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = AutoConfig.for_model("bert", vocab_size=len(tokenizer), max_position_embeddings=64, **sizes, **dropout)
    torch.manual_seed(0)
    model = AutoModel.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # Fresh models see hardly a difference between two texts.
            if parameter.ndim == 2:
                parameter.mul_(8)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_classifier_learns_and_is_not_served(bert: Path, tmp_path: Path, quantization: str) -> None:
    config = tiny_run(
        bert,
        tmp_path,
        ROWS,
        task="sequence-classification",
        dropout=0.0,
        quantization=quantization,
        max_steps=40,
        per_device_batch_size=16,
        learning_rate=1e-2,
    )
    result = train(config, watcher := Watcher())
    assert result.adapter is not None
    assert result.adapter.accuracy == 1.0
    assert "no head for classes" in result.serving_problem
    assert any("will not serve this adapter" in note for note in watcher.notes)
    assert "text-classification" in (tmp_path / "adapter" / "README.md").read_text()


def test_merged_equals_unmerged(bert: Path, tmp_path: Path) -> None:
    config = tiny_run(
        bert, tmp_path, ROWS, task="sequence-classification", target_modules=["query", "value"], quantization="none"
    )
    train(config)
    arguments = ["merge", "--adapter", config.output_dir, "--model", str(bert), "--output", str(tmp_path / "merged")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert merged.config.id2label == {0: "lazy", 1: "quick"}
    base: Any = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=2, dtype=torch.float32)
    unmerged = peft.PeftModel.from_pretrained(base, config.output_dir).eval()
    ids = torch.arange(3, 33).reshape(3, 10)
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=ids).logits, unmerged(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
    (tmp_path / "adapter" / "labels.json").unlink()
    with pytest.raises(AdapterFormatError, match=r"labels\.json: is needed"):
        merge_classifier(str(bert), tmp_path / "adapter", tmp_path / "again")
    assert not (tmp_path / "again").exists()
