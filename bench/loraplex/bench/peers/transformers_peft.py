"""Driver of transformers with PEFT: one static batch, a different adapter for each row by `adapter_names`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from loraplex.bench.peers.driver import Facts, Job, Request, converse

BASE = "__base__"
"""PEFT's name for rows without an adapter."""


class TransformersPeft:
    """A `System` in this process."""

    def __init__(self) -> None:
        self._model: Any = None

    def prepare(self, job: Job) -> None:
        """Nothing is to be prepared."""

    def start(self, job: Job) -> Facts:
        """Load the model in bfloat16 (or the option `dtype`), and the adapters beside it."""
        import peft
        import transformers

        dtype = job.options.get("dtype", "bfloat16")
        self._model = load_with_adapters(job, dtype)
        self._model.generation_config.eos_token_id = None
        self._model.generation_config.pad_token_id = 0
        version = f"transformers {transformers.__version__}, peft {peft.__version__}"
        return Facts(version, dtype, "in process, one static batch")

    def run(self, requests: Sequence[Request], max_tokens: int) -> list[list[int]]:
        """Generate for all rows, padded on the left."""
        import torch

        width = max(len(request.prompt) for request in requests)
        ids = torch.tensor([[0] * (width - len(request.prompt)) + request.prompt for request in requests])
        mask = torch.tensor([[0] * (width - len(request.prompt)) + [1] * len(request.prompt) for request in requests])
        options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": max_tokens, "do_sample": False}
        with torch.inference_mode():
            if any(request.adapter for request in requests):
                names = [request.adapter or BASE for request in requests]
                tokens = self._model.generate(input_ids=ids, adapter_names=names, **options)
            else:
                tokens = self._model.generate(input_ids=ids, **options)
        return [row[width:].tolist() for row in tokens]

    def stop(self) -> None:
        """Nothing is to be stopped."""


def load_with_adapters(job: Job, dtype: str) -> Any:
    """Return the job's model in `dtype` with all of its adapters beside it, in PEFT if there are any."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(job.threads)
    model: Any = AutoModelForCausalLM.from_pretrained(job.model, dtype=getattr(torch, dtype))
    for name, folder in job.adapters.items():
        if isinstance(model, PeftModel):
            model.load_adapter(folder, name)
        else:
            model = PeftModel.from_pretrained(model, folder, name)
    return model.eval()


if __name__ == "__main__":
    converse(TransformersPeft())
