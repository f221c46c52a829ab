"""What the operator decides, as frozen dataclasses resolved once at start."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from loraplex.adapters.sources import SourcePolicy

MIB = 1024**2


@dataclass(frozen=True)
class ModelConfig:
    """Which base model, and how its weights are held.

    `model` is a hub id, a Hugging Face folder or a GGUF file. `dtype` "auto" is bfloat16 where the device computes in
    it and float32 elsewhere. `weight_execution` says how quantized weights are multiplied on a CPU: "packed" as they
    are stored, "dequantized" from a copy in the compute dtype, "auto" the faster one that fits in memory.
    """

    model: str
    quantization: str = "none"
    dtype: str = "auto"
    device: str = "cpu"
    weight_execution: str = "auto"


@dataclass(frozen=True)
class EngineConfig:
    """Budgets of the batching engine.

    Attributes:
        max_num_seqs: rows in one forward pass.
        max_num_batched_tokens: tokens in one forward pass, decode rows included.
        max_model_len: tokens in prompt and output together; 0 takes the model's own limit.
        max_waiting: sequences waiting for a row; a request that comes then is refused.
        max_wait_s: an adapter whose queue has had no admission for longer than this is served before all others.
        block_size: tokens in one KV block.
        kv_cache_memory: bytes for keys and values; 0 takes `CPU_KV_CACHE_MEMORY` on a CPU, and on a GPU what is left.
        gpu_memory_utilization: share of a GPU's memory that all of this together may take.
        cuda_graphs: capture decode steps on a GPU.
        adapter_device_memory: bytes for adapter weights beside the base model.
        adapter_host_memory: bytes for adapter weights in the host's memory, between disk and device. On a CPU an
            adapter that is in both exists once.
        adapter_dtype: "auto" (the compute dtype), "float32", "bfloat16" or "float16".
        enable_prefix_caching: reuse the blocks of equal prompts under equal effective weights.
        threads: CPU threads of the matrix products; 0 leaves PyTorch's choice.
    """

    max_num_seqs: int = 32
    max_num_batched_tokens: int = 512
    max_model_len: int = 0
    max_waiting: int = 1024
    max_wait_s: float = 2.0
    block_size: int = 16
    kv_cache_memory: int = 0
    gpu_memory_utilization: float = 0.9
    cuda_graphs: bool = True
    adapter_device_memory: int = 1024 * MIB
    adapter_host_memory: int = 2048 * MIB
    adapter_dtype: str = "auto"
    enable_prefix_caching: bool = True
    threads: int = 0

    CPU_KV_CACHE_MEMORY: ClassVar[int] = 512 * MIB

    def __post_init__(self) -> None:
        """Check the budgets against each other.

        Raises:
            ValueError: naming the option that is out of range.
        """
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_waiting", "block_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        unset = ("max_model_len", "kv_cache_memory", "adapter_device_memory", "adapter_host_memory", "threads")
        for name in unset:
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least max_num_seqs "
                f"({self.max_num_seqs}), or a full batch of decodes would not fit in a step"
            )
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError(f"gpu_memory_utilization must be above 0 and at most 1, got {self.gpu_memory_utilization}")
        if self.max_wait_s < 0:
            raise ValueError(f"max_wait_s must not be negative, got {self.max_wait_s}")
        if self.adapter_dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError(f"adapter_dtype must be auto, float32, bfloat16 or float16, got {self.adapter_dtype!r}")


@dataclass(frozen=True)
class ServerConfig:
    """Everything `loraplex serve` is told.

    Attributes:
        adapters: folders whose sub-folders (or which themselves) are adapters to register at start.
        adapter_roots: folders below which `RegisterAdapter` may read; `adapters` are added to them.
        sources: which URLs it may read, and what is taken at most.
        state_dir: where registered adapters and the catalog live; None keeps them in a temporary folder.
        export_root: where `MergeAdapter` writes; None turns exports off.
        grace_period_s: how long running requests may go on after a stop signal.
        max_message_bytes: largest gRPC message taken.
    """

    model: ModelConfig
    engine: EngineConfig = EngineConfig()
    adapters: tuple[Path, ...] = ()
    adapter_roots: tuple[Path, ...] = ()
    sources: SourcePolicy = field(default_factory=SourcePolicy)
    state_dir: Path | None = None
    export_root: Path | None = None
    host: str = "127.0.0.1"
    port: int = 50051
    metrics_host: str = "127.0.0.1"
    metrics_port: int = 8000
    grace_period_s: float = 30.0
    max_message_bytes: int = 16 * MIB
    served_model_name: str = ""
    log_level: str = "info"
