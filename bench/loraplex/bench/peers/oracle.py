"""Judges answers with PEFT in float32: how well do an adapter, the base and other adapters explain what was written?

Comparing texts would call a near-tie a fault: one token that fell the other way changes everything after it. So each
token is judged after the tokens that the system itself wrote before it.
"""

from __future__ import annotations

from typing import Any

from loraplex.bench.peers.driver import Job, answer_lines
from loraplex.bench.peers.transformers_peft import BASE


class Oracle:
    """transformers and PEFT in float32."""

    def __init__(self) -> None:
        self._model: Any = None
        self._tokenizer: Any = None

    def start(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Load the job's model and adapters."""
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, AutoTokenizer

        job = Job.parse(asked["start"])
        torch.set_num_threads(job.threads)
        self._tokenizer = AutoTokenizer.from_pretrained(job.model)
        model: Any = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)
        for name, folder in job.adapters.items():
            if isinstance(model, PeftModel):
                model.load_adapter(folder, name)
            else:
                model = PeftModel.from_pretrained(model, folder, name)
        self._model = model.eval()
        return {}

    def tokenize(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Return the ids of each text."""
        return {"ids": [self._tokenizer(text)["input_ids"] for text in asked["tokenize"]]}

    def score(self, asked: dict[str, Any]) -> dict[str, Any]:
        """For each `[prompt ids, output ids, [adapters]]` return `[regret, greedy share]` by adapter.

        The regret is how much less likely the written tokens are than the most likely ones there, in nats, the mean per
        token; the greedy share is that of the tokens which are the most likely ones. What an exact model writes
        has regret 0 and share 1.
        """
        scores = []
        for prompt, output, adapters in asked["score"]:
            scores.append([self._score(prompt, output, adapter) for adapter in adapters])
        return {"scores": scores}

    def _score(self, prompt: list[int], output: list[int], adapter: str) -> tuple[float, float]:
        import torch

        ids = torch.tensor([prompt + output])
        with torch.inference_mode():
            logits = self._model(ids, adapter_names=[adapter or BASE]).logits[0, len(prompt) - 1 : -1]
        written = torch.tensor(output)
        regret = logits.amax(-1) - logits.gather(1, written[:, None])[:, 0]
        return float(regret.mean()), float((logits.argmax(-1) == written).double().mean())


if __name__ == "__main__":
    oracle = Oracle()
    answer_lines({"start": oracle.start, "tokenize": oracle.tokenize, "score": oracle.score})
