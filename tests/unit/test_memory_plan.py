"""How a GPU's memory is divided, and what is said when it does not suffice; the GPU is a fake."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from loraplex.adapters.binding import BoundAdapter
from loraplex.server.config import EngineConfig
from loraplex.server.engine import build, runner_build
from loraplex.server.engine.engine import Engine
from loraplex.server.engine.limits import engine_limits, kv_cache_shape
from loraplex.server.engine.memory_plan import DeviceMemory, StepSize, step_bytes
from loraplex.server.engine.model_runner import ModelRunner
from loraplex.server.engine.runner_build import GPU_WARM_UP_TOKENS
from loraplex.server.engine.scheduler import ScheduledSequence
from loraplex.server.engine.stats import NullObserver
from loraplex.server.engine.step_shapes import step_shapes
from loraplex.server.errors import ModelLoadError
from loraplex.server.lora.ops.triton_plan import MIN_LONG_TOKENS
from loraplex.server.models.device import resolve_device
from loraplex.server.models.loader import LoadedModel, load_model
from tests.parity.tiny_models import TinyModel
from tests.unit.fakes import byte_tokenizer
from tests.unit.recording_backend import RecordingBackend
from tests.unit.slow_copies import SlowCopies

MIB = 2**20
CONFIG = EngineConfig(max_num_seqs=4, adapter_device_memory=8 * MIB)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = tmp_path_factory.mktemp("planned")
    TinyModel("planned", "llama").save(folder)
    return load_model(str(folder), dtype="float32")


@dataclass
class FakeAccelerator:
    """Implements `Accelerator`; its memory is whatever the test says."""

    bytes_free: int
    made: SlowCopies | None = None
    entered: int = 0

    def memory(self) -> DeviceMemory:
        return DeviceMemory(total=400 * MIB, free=self.bytes_free)

    def current(self) -> nullcontext[None]:
        self.entered += 1
        return nullcontext()

    def capture_backend(self) -> RecordingBackend:
        return RecordingBackend(fail_at=0)

    def copies(self, on_done: Callable[[], None]) -> SlowCopies:
        self.made = SlowCopies(on_done)
        return self.made


def test_keys_and_values_get_what_is_left(model: LoadedModel) -> None:
    memory = DeviceMemory(total=200 * MIB, free=170 * MIB - model.weight_bytes)
    config = replace(CONFIG, cuda_graphs=False)
    limits = engine_limits(model, config, memory)
    plan = limits.plan
    assert plan is not None
    assert plan.others == 30 * MIB
    assert plan.graphs == 0
    assert plan.kv_cache == 180 * MIB - 30 * MIB - 8 * MIB - model.weight_bytes - plan.step
    assert limits.num_blocks == plan.kv_cache // kv_cache_shape(model, config).block_bytes
    with_graphs = engine_limits(model, CONFIG, memory)
    assert with_graphs.plan is not None
    assert with_graphs.plan.graphs > 8 * MIB * len(step_shapes(4, 2))
    block_bytes = kv_cache_shape(model, CONFIG).block_bytes
    assert with_graphs.num_blocks == with_graphs.plan.kv_cache // block_bytes - 1, "one fills up captured steps"


def test_a_given_size_is_taken_and_a_cpu_has_its_own_default(model: LoadedModel) -> None:
    given = replace(CONFIG, kv_cache_memory=MIB, cuda_graphs=False)
    assert engine_limits(model, given, DeviceMemory(100 * MIB, 80 * MIB)).kv_cache_bytes <= MIB
    assert engine_limits(model, CONFIG).kv_cache_bytes == 512 * MIB // 6144 * 6144
    assert engine_limits(model, CONFIG).plan is None


@pytest.mark.parametrize(
    ("config", "free"),
    [
        (CONFIG, 20 * MIB),  # others hold too much
        (replace(CONFIG, adapter_device_memory=95 * MIB), 99 * MIB),
        (replace(CONFIG, kv_cache_memory=85 * MIB), 99 * MIB),
        (replace(CONFIG, gpu_memory_utilization=0.1), 99 * MIB),
    ],
)
def test_what_does_not_fit_is_refused_with_the_plan(model: LoadedModel, config: EngineConfig, free: int) -> None:
    with pytest.raises(ModelLoadError, match="--gpu-memory-utilization") as refused:
        engine_limits(model, config, DeviceMemory(100 * MIB, free))
    text = str(refused.value)
    assert "left for keys and values" in text
    assert f"{config.adapter_device_memory / MIB:,.0f} MiB" in text


def test_a_step_grows_with_its_tokens_and_rows(model: LoadedModel) -> None:
    config = model.decoder.config
    base = step_bytes(config, StepSize(100, 4, 2))
    tokens = step_bytes(config, StepSize(200, 4, 2))
    # 3 x 32 hidden, gate and up with what is made of them 3 x 48; qkv 64 twice and attention 32 is less narrow.
    assert tokens - base == pytest.approx(1.1 * 2 * 100 * (3 * 32 + max(2 * 64 + 32, 3 * 48)), abs=2)
    rows = step_bytes(config, StepSize(100, 8, 2))
    assert rows - base == pytest.approx(1.1 * 4 * 2 * 4 * config.vocab_size, abs=2)


def build_with(gpu: FakeAccelerator, model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> Engine:
    monkeypatch.setattr(build, "accelerator_for", lambda device: gpu)

    def load(digest: str) -> BoundAdapter:
        raise AssertionError("nothing asks for an adapter")

    return build.build_engine(model, byte_tokenizer(), CONFIG, load, NullObserver(), lambda outputs: None)


def test_an_engine_is_built_for_an_accelerator(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeAccelerator(399 * MIB)
    engine = build_with(gpu, model, monkeypatch)
    assert gpu.made is not None, "adapters come beside the steps"
    assert gpu.entered == 1 + 2 * len(GPU_WARM_UP_TOKENS), "building and the first steps run on it"
    engine._parts.slots.close()
    assert gpu.made.closed


def test_what_a_gpu_compiles_at_first_use_is_compiled_at_start(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    segments: list[int] = []

    def run(self: ModelRunner, rows: Sequence[ScheduledSequence], *more: object) -> None:
        segments.append(sum(row.num_tokens for row in rows))  # of one adapter

    monkeypatch.setattr(ModelRunner, "run", run)
    build_with(FakeAccelerator(399 * MIB), model, monkeypatch)._parts.slots.close()
    assert min(segments) < MIN_LONG_TOKENS <= max(segments), "each is for kernels of its own"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("CUDA error: out of memory"),  # the driver, which makes graphs and pinned memory
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_a_device_that_is_full_in_spite_of_the_plan_is_a_typed_error_with_it(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch, error: RuntimeError
) -> None:
    def full(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(runner_build, "KVCache", full)
    with pytest.raises(ModelLoadError, match="ran out of memory at start") as refused:
        build_with(FakeAccelerator(399 * MIB), model, monkeypatch)
    assert "left for keys and values" in str(refused.value)
    assert str(error) in str(refused.value)


def test_another_fault_at_start_is_not_called_a_lack_of_memory(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(runner_build, "KVCache", broken)
    with pytest.raises(RuntimeError, match="illegal"):
        build_with(FakeAccelerator(399 * MIB), model, monkeypatch)


def test_weights_that_do_not_fit_are_a_typed_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    TinyModel("full", "llama").save(tmp_path)

    def full(*arguments: object, **more: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("loraplex.server.models.loader.make_linear", full)
    with pytest.raises(ModelLoadError, match="do not fit in the memory of cpu"):
        load_model(str(tmp_path))


def test_devices() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("cuda", 1) == torch.device("cuda", 0)
    assert resolve_device("cuda:1", 2) == torch.device("cuda", 1)
    for name, gpus, match in (
        ("cuda:2", 2, "2 GPUs, numbered from 0"),
        ("cuda", 0, "no GPU"),
        ("cuda:x", 1, "unknown device"),
        ("tpu", 1, "unknown device"),
    ):
        with pytest.raises(ModelLoadError, match=match):
            resolve_device(name, gpus)
