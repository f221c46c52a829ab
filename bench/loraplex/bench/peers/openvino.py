"""Driver of OpenVINO GenAI: its continuous batching pipeline over an int8 conversion of the model."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from loraplex.bench.peers.driver import Facts, Job, Request, converse

CACHE_GB = 1


class OpenVINO:
    """A `System` in this process."""

    def __init__(self) -> None:
        self._pipeline: Any = None
        self._adapters: dict[str, Any] = {}

    def prepare(self, job: Job) -> None:
        """Convert the model to OpenVINO's form with int8 weights, once."""
        folder = _converted(job)
        if (folder / "openvino_model.bin").is_file() and (folder / "openvino_tokenizer.xml").is_file():
            return
        command = [str(Path(sys.executable).parent / "optimum-cli"), "export", "openvino", "--model", str(job.model)]
        options = ["--task", "text-generation-with-past", "--weight-format", "int8", str(folder)]
        subprocess.run([*command, *options], check=True, stdout=sys.stderr)

    def start(self, job: Job) -> Facts:
        """Load the converted model, with all adapters known to the pipeline."""
        import openvino_genai

        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = CACHE_GB
        scheduler.max_num_seqs = job.rows
        properties: dict[str, Any] = {"INFERENCE_NUM_THREADS": job.threads}
        self._adapters = {
            name: (openvino_genai.Adapter(folder / "adapter_model.safetensors"), _scaling(folder))
            for name, folder in job.adapters.items()
        }
        if self._adapters:
            properties["adapters"] = openvino_genai.AdapterConfig(list(self._adapters.values()))
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(
            str(_converted(job)), scheduler, "CPU", properties=properties
        )
        return Facts(f"openvino-genai {version('openvino-genai')}", "int8", "in process, continuous batching")

    def run(self, requests: Sequence[Request], max_tokens: int) -> list[list[int]]:
        """Generate for all requests; each has a configuration of its own that names its adapter."""
        import numpy as np
        import openvino

        prompts = [openvino.Tensor(np.array([request.prompt], dtype=np.int64)) for request in requests]
        results = self._pipeline.generate(prompts, [self._config(request, max_tokens) for request in requests])
        ordered = sorted(results, key=lambda result: result.m_request_id)
        return [list(result.m_generation_ids[0]) for result in ordered]

    def stop(self) -> None:
        """Let go of the pipeline."""
        self._pipeline = None

    def _config(self, request: Request, max_tokens: int) -> Any:
        import openvino_genai

        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = max_tokens
        config.ignore_eos = True
        config.do_sample = False
        if self._adapters:
            chosen = [self._adapters[request.adapter]] if request.adapter else []
            config.adapters = openvino_genai.AdapterConfig(chosen)
        return config


def _converted(job: Job) -> Path:
    return job.folder / f"{job.model.name}-int8"


def _scaling(adapter: Path) -> float:
    """Return alpha / r: the safetensors file that OpenVINO reads does not have it."""
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    return float(config["lora_alpha"] / config["r"])


if __name__ == "__main__":
    converse(OpenVINO())
