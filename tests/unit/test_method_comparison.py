from __future__ import annotations

import pytest

from loraplex.adapters.errors import InvalidRequestError
from loraplex.adapters.training.architecture import read_architecture
from loraplex.adapters.training.figure import png_bytes
from loraplex.adapters.training.method_comparison import MethodRun, compare_methods, config_of
from loraplex.adapters.training.method_comparison_chart import draw_comparison
from loraplex.adapters.training.train_config import TrainConfig
from loraplex.adapters.training.training_memory import METHODS, Method

CONFIG = TrainConfig(model="demo", data="data.jsonl", output_dir="out", rank=8, max_length=64)


def fake(method: Method, config: TrainConfig) -> MethodRun:
    seconds = {"full": 10.0, "lora": 8.0, "qlora": 12.0}[method]
    return MethodRun(0.9, 100, 0.5, 0.2, 1000, seconds, 10**9)


def test_all_get_the_same_steps_and_what_suits_them() -> None:
    found = compare_methods(CONFIG, METHODS, 20, read_architecture("smollm2-135m"), fake)
    assert [point.method for point in found.points] == list(METHODS)
    assert [point.learning_rate for point in found.points] == [pytest.approx(2e-5), 2e-4, 2e-4]
    assert [found.time_factor(point) for point in found.points] == [1.0, 0.8, 1.2]
    full, lora, qlora = (point.planned for point in found.points)
    assert full > 16 * 134_515_008
    assert qlora < lora < full
    figure = draw_comparison(found)
    assert png_bytes(figure).startswith(b"\x89PNG")


def test_configurations_differ_in_what_the_method_is() -> None:
    made = {method: config_of(CONFIG, method, 20) for method in METHODS}
    assert {method: own.quantization for method, own in made.items()} == {
        "full": "none",
        "lora": "none",
        "qlora": "nf4",
    }
    assert made["full"].dtype == "float32"
    assert {own.max_steps for own in made.values()} == {20}
    assert {own.output_dir for own in made.values()} == {"out/full", "out/lora", "out/qlora"}


def test_a_large_model_is_not_fine_tuned_as_a_whole() -> None:
    model = read_architecture("llama-3.2-1b")
    with pytest.raises(InvalidRequestError, match="500,000,000"):
        compare_methods(CONFIG, METHODS, 20, model, fake)
    with pytest.raises(InvalidRequestError, match="methods"):
        compare_methods(CONFIG, (), 20, model, fake)
