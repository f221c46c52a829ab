"""What a training step computes, against TRL and against itself: tokens, losses and gradients."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import AutoTokenizer
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from loraplex.adapters.training.answer_trainer import AnswerTrainer, RunMeter
from loraplex.adapters.training.frozen_base import load_base, load_tokenizer
from loraplex.adapters.training.lora_model import add_adapter
from loraplex.adapters.training.train_config import TrainConfig
from loraplex.adapters.training.training_data import load_data
from tests.parity.training_setup import ROWS, save_base, tiny_run

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


def make_model(config: TrainConfig) -> Any:
    model = add_adapter(load_base(config, CPU), config, [], Path(config.output_dir))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.train()


def make_trainer(config: TrainConfig, kind: Callable[..., Any], **options: Any) -> Any:
    tokenizer = load_tokenizer(config)
    data = load_data(config, tokenizer)
    arguments = SFTConfig(
        output_dir=str(Path(config.output_dir).parent / "trl"),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        dataset_kwargs={"skip_prepare_dataset": True},
        **options,
    )
    return kind(model=make_model(config), args=arguments, train_dataset=data.train, processing_class=tokenizer)


def gradients(trainer: Any, rows: list[dict[str, Any]]) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss of one step, and what it says about every trained number."""
    batch = trainer.data_collator(rows)
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    trained = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    return loss.item(), trained


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_the_cheap_loss_is_trls(base: Path, tmp_path: Path, quantization: str) -> None:
    # Without dropout, which would differ from run to run.
    config = tiny_run(base, tmp_path, quantization=quantization, dropout=0.0)
    results = []
    for kind in (SFTTrainer, lambda **options: AnswerTrainer(RunMeter(), **options)):
        trainer = make_trainer(config, kind)
        # TRL rounds the adapter to bfloat16 on a quantized base; here both compute in float32.
        trainer.model.float() if quantization == "none" else None
        trained = [p for p in trainer.model.parameters() if p.requires_grad]
        fresh = [p for p in make_model(config).parameters() if p.requires_grad]
        for parameter, value in zip(trained, fresh, strict=True):
            parameter.data = value.data
        results.append(gradients(trainer, trainer.train_dataset.select(range(4)).to_list()))
    (trl_loss, trl_gradients), (loss, ours) = results
    assert loss == pytest.approx(trl_loss, rel=1e-5)
    assert ours.keys() == trl_gradients.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, trl_gradients[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_evaluation_changes_no_gradient(base: Path, tmp_path: Path, quantization: str, dtype: str) -> None:
    config = tiny_run(base, tmp_path, quantization=quantization, dtype=dtype, dropout=0.0)
    trainer = make_trainer(config, lambda **options: AnswerTrainer(RunMeter(), **options))
    rows = trainer.train_dataset.select(range(4)).to_list()
    before = gradients(trainer, rows)
    # Every layer's A and B must be reached, also those that only a gradient through 4-bit weights reaches.
    assert all(gradient.abs().max() > 0 for gradient in before[1].values())
    trainer.evaluate(trainer.train_dataset)
    with torch.inference_mode():
        trainer.model.generate(torch.tensor([rows[0]["input_ids"]]), max_new_tokens=2)
    trainer.model.train()
    after = gradients(trainer, rows)
    assert after[0] == before[0]
    assert after[1].keys() == before[1].keys()
    for name, gradient in before[1].items():
        assert torch.equal(gradient, after[1][name]), name


@pytest.mark.parametrize(
    ("rows", "chat", "completion_only"),
    [
        (ROWS, "yes", True),
        (ROWS, "no", True),
        (ROWS, "no", False),
        ([{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 3, "auto", False),
        ([{"text": f"The number {n}."} for n in range(5)], "auto", True),
    ],
    ids=["chat", "plain", "plain-whole", "messages", "text"],
)
def test_tokens_and_labels_are_trls(
    base: Path, tmp_path: Path, rows: list[dict[str, Any]], chat: str, completion_only: bool
) -> None:
    config = tiny_run(
        base,
        tmp_path,
        rows,
        chat=chat,
        completion_only_loss=completion_only,
        validation_fraction=0.0,
        quantization="none",
    )
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    tokenizer.pad_token = tokenizer.eos_token
    ours = load_data(config, tokenizer).train
    given: list[Any] = [dict(row) for row in rows]
    if chat == "yes":
        roles = {"prompt": "user", "completion": "assistant"}
        given = [{k: [{"role": roles[k], "content": v}] for k, v in row.items()} for row in rows]
    only = completion_only if "prompt" in rows[0] else None
    arguments = SFTConfig(
        output_dir=str(tmp_path / "trl"), use_cpu=True, bf16=False, report_to="none", completion_only_loss=only
    )
    trl: Any = SFTTrainer(
        model=make_model(config),
        args=arguments,
        train_dataset=datasets.Dataset.from_list(given),
        processing_class=tokenizer,
    )
    assert ours["input_ids"][:] == trl.train_dataset["input_ids"][:]
    assert ours["labels"][:] == trl.train_dataset["labels"][:]


def test_packed_rows_do_not_see_each_other(base: Path, tmp_path: Path) -> None:
    config = tiny_run(base, tmp_path, quantization="none", dropout=0.0)
    apart = make_trainer(config, lambda **options: AnswerTrainer(RunMeter(), **options))
    rows = apart.train_dataset.select(range(6)).to_list()
    loss, expected = gradients(apart, rows)
    packed = make_trainer(config, lambda **options: AnswerTrainer(RunMeter(), **options), packing=True, max_length=128)
    from trl.data_utils import pack_dataset

    sequences = pack_dataset(datasets.Dataset.from_list(rows), 128, "bfd").to_list()
    assert len(sequences) < len(rows)
    packed_loss, found = gradients(packed, sequences)
    assert packed_loss == pytest.approx(loss, rel=1e-5)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6)
