"""One request while the engine works on it: its choices, their text, and how each of them ends.

Knows tokens and text; nothing about scheduling or devices.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from loraplex.server.engine.detokenizer import IncrementalDetokenizer
from loraplex.server.engine.request import ChoiceDelta, FinishReason, GenerationRequest, Logprobs, Usage
from loraplex.server.engine.sequence import Sequence
from loraplex.server.tokenizer import Tokenizer


class ActiveRequest:
    """The choices of one request.

    Choices after the first start when the first has its prompt computed, so that they find it in the prefix cache.
    """

    def __init__(self, request: GenerationRequest, arrival_s: float, tokenizer: Tokenizer) -> None:
        self.request = request
        self.arrival_s = arrival_s
        self.sequences = [Sequence(request, choice, arrival_s) for choice in range(request.params.n)]
        self._started = 0
        self._detokenizers = [
            IncrementalDetokenizer(tokenizer, request.prompt_token_ids, request.params.stop) for _ in self.sequences
        ]

    @property
    def is_finished(self) -> bool:
        """Whether every choice has ended."""
        return all(seq.finish_reason is not None for seq in self.sequences)

    @property
    def unfinished(self) -> Iterator[Sequence]:
        """The started choices that have not ended."""
        return (seq for seq in self.sequences[: self._started] if seq.finish_reason is None)

    @property
    def usage(self) -> Usage:
        """Token counts so far."""
        return Usage(
            prompt_tokens=len(self.request.prompt_token_ids),
            completion_tokens=sum(seq.num_output_tokens for seq in self.sequences),
            cached_tokens=self.sequences[0].num_cached_tokens,
        )

    def start_first(self) -> Sequence:
        """Return the choice to schedule at once."""
        self._started = 1
        return self.sequences[0]

    def start_rest(self) -> list[Sequence]:
        """Return the choices that may be scheduled now that the prompt is computed; empty after the first call."""
        rest = self.sequences[self._started :]
        self._started = len(self.sequences)
        return rest

    def append(
        self, seq: Sequence, sampled: Logprobs, eos_token_ids: frozenset[int], max_model_len: int
    ) -> ChoiceDelta:
        """Add one token to a choice; return what that makes known, with the finish reason if it ends the choice."""
        token_id, params = sampled.token_id, self.request.params
        seq.token_ids.append(token_id)
        detokenizer = self._detokenizers[seq.choice]
        text = ""
        if (token_id in eos_token_ids and not params.ignore_eos) or token_id in params.stop_token_ids:
            seq.finish_reason = FinishReason.STOP
        else:
            piece = detokenizer.push(token_id)
            text = piece.text
            if piece.stopped:
                seq.finish_reason = FinishReason.STOP
                return self._delta(seq, text, sampled)
            if seq.num_output_tokens >= params.max_tokens or len(seq.token_ids) >= max_model_len:
                seq.finish_reason = FinishReason.LENGTH
        if seq.finish_reason is not None:
            text += detokenizer.finish()
            if detokenizer.stopped:  # what was held back held a stop string
                seq.finish_reason = FinishReason.STOP
        return self._delta(seq, text, sampled)

    def _delta(self, seq: Sequence, text: str, sampled: Logprobs) -> ChoiceDelta:
        wanted = self.request.params.logprobs
        logprobs = () if wanted is None else (replace(sampled, top=sampled.top[:wanted]),)
        return ChoiceDelta(seq.choice, text, (sampled.token_id,), logprobs, seq.finish_reason)
