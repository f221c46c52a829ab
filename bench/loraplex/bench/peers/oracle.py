"""Judges answers with PEFT in float32: how well do an adapter, the base and other adapters explain what was written?

Comparing texts would call a near-tie a fault: one token that fell the other way changes everything after it. So each
token is judged after the tokens that the system itself wrote before it.
"""

from __future__ import annotations

from typing import Any

from loraplex.bench.peers.driver import Job, answer_lines
from loraplex.bench.peers.transformers_peft import BASE, load_with_adapters


class Oracle:
    """transformers and PEFT in float32."""

    def __init__(self) -> None:
        self._model: Any = None
        self._tokenizer: Any = None

    def start(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Load the job's model and adapters."""
        from transformers import AutoTokenizer

        job = Job.parse(asked["start"])
        self._tokenizer = AutoTokenizer.from_pretrained(job.model)
        self._model = load_with_adapters(job, "float32")
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
        return {"scores": [self._scores(prompt, output, adapters) for prompt, output, adapters in asked["score"]]}

    def _scores(self, prompt: list[int], output: list[int], adapters: list[str]) -> list[tuple[float, float]]:
        """Return the scores under each adapter, all of them in one batch."""
        import torch

        ids = torch.tensor([prompt + output]).expand(len(adapters), -1)
        with torch.inference_mode():
            logits = self._model(ids, adapter_names=[name or BASE for name in adapters]).logits
        written = torch.tensor(output)
        scores = []
        for row in logits[:, len(prompt) - 1 : -1]:
            regret = row.amax(-1) - row.gather(1, written[:, None])[:, 0]
            scores.append((float(regret.mean()), float((row.argmax(-1) == written).double().mean())))
        return scores


if __name__ == "__main__":
    oracle = Oracle()
    answer_lines({"start": oracle.start, "tokenize": oracle.tokenize, "score": oracle.score})
