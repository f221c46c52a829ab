"""Plans of memory against what training the demo model really takes, each in a process of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from loraplex.adapters.training.advisor import shape_of
from loraplex.adapters.training.architecture import read_architecture
from loraplex.adapters.training.measured_step import measure_step
from loraplex.adapters.training.train_config import TrainConfig
from loraplex.adapters.training.training_memory import Method, training_memory

TOLERANCE = 0.15


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "quantization", "checkpointing"),
    [("full", "none", False), ("lora", "none", True), ("qlora", "nf4", False)],
)
def test_the_peak_is_the_planned_one(demo_path: Path, method: Method, quantization: str, checkpointing: bool) -> None:
    config = TrainConfig(
        model=str(demo_path),
        data="-",
        output_dir="-",
        rank=8,
        quantization=quantization,
        dtype="float32",
        device="cpu",
        max_length=160,
        per_device_batch_size=2,
        gradient_checkpointing=checkpointing,
    )
    planned = training_memory(read_architecture(str(demo_path)), method, shape_of(config))
    assert planned.total == pytest.approx(measure_step(config.to_values(), method), rel=TOLERANCE)
