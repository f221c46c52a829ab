"""`loraplex serve`: the configuration that its options make."""

from __future__ import annotations

from pathlib import Path

import pytest

from loraplex.adapters.sources import SourcePolicy
from loraplex.cli import serve
from loraplex.cli.sizes import format_size, parse_size
from loraplex.server.config import MIB, EngineConfig, ModelConfig, ServerConfig
from tests.unit.command import Run, ok


@pytest.fixture
def configs(monkeypatch: pytest.MonkeyPatch) -> list[ServerConfig]:
    """Collect what `serve` would have served."""
    configs: list[ServerConfig] = []
    monkeypatch.setattr(serve, "run", configs.append)
    return configs


def test_serve_defaults_are_the_configurations(run: Run, configs: list[ServerConfig]) -> None:
    ok(run("serve", "--model", "m"))
    assert configs == [ServerConfig(ModelConfig("m"), served_model_name="m")]


def test_serve_options(run: Run, configs: list[ServerConfig]) -> None:
    ok(
        run(
            *("serve", "--model", "m", "--quantization", "nf4", "--dtype", "bfloat16", "--device", "cuda:1"),
            *("--weight-execution", "packed", "--served-model-name", "shown", "--adapters", "a", "--adapters", "b"),
            *("--adapter-root", "r", "--state-dir", "s", "--export-root", "e", "--host", "0.0.0.0", "--port", 1),
            *("--metrics-host", "::", "--metrics-port", 2, "--grace-period", 3.5, "--log-level", "debug"),
            *("--max-num-seqs", 4, "--max-num-batched-tokens", 5, "--max-model-len", 6, "--max-waiting", 7),
            *("--block-size", 8, "--kv-cache-memory", "9MiB", "--adapter-device-memory", "1.5GiB", "--threads", 10),
            *("--adapter-host-memory", "3GiB", "--gpu-memory-utilization", 0.8, "--no-cuda-graphs"),
            *("--adapter-dtype", "float32", "--no-prefix-caching", "--adapter-source", "hf://org"),
            *("--adapter-source", "s3://bucket/adapters", "--adapter-source-timeout", 9, "--max-upload-size", "1GiB"),
        )
    )
    assert configs == [
        ServerConfig(
            model=ModelConfig("m", "nf4", "bfloat16", "cuda:1", "packed"),
            engine=EngineConfig(
                max_num_seqs=4,
                max_num_batched_tokens=5,
                max_model_len=6,
                max_waiting=7,
                block_size=8,
                kv_cache_memory=9 * MIB,
                gpu_memory_utilization=0.8,
                cuda_graphs=False,
                adapter_device_memory=1536 * MIB,
                adapter_host_memory=3 * 1024 * MIB,
                adapter_dtype="float32",
                enable_prefix_caching=False,
                threads=10,
            ),
            adapters=(Path("a"), Path("b")),
            adapter_roots=(Path("r"),),
            sources=SourcePolicy(("hf://org", "s3://bucket/adapters"), 1024 * MIB, 9.0),
            state_dir=Path("s"),
            export_root=Path("e"),
            host="0.0.0.0",
            port=1,
            metrics_host="::",
            metrics_port=2,
            grace_period_s=3.5,
            served_model_name="shown",
            log_level="debug",
        )
    ]


def test_sizes() -> None:
    sizes = {"512MiB": 512 * MIB, "1.5GiB": 1536 * MIB, "2k": 2048, "1MB": 10**6, "7": 7, " 3 B ": 3, "1TiB": 2**40}
    assert {text: parse_size(text, "--x") for text in sizes} == sizes
    for size, text in ((0, "0B"), (1023, "1023B"), (1024, "1KiB"), (1536 * MIB, "1.5GiB"), (2**52, "4096TiB")):
        assert format_size(size) == text
