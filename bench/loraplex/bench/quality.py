"""What rounding costs: perplexity and divergence of what a server computes with, against float32, on a fixed text.

Every model goes through the engine's own decoder, attention and products, one token for each of 16 rows a step: the
kernels that serve. Looks inside on purpose, as `kernels` does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from loraplex.bench.text import fixed_text, text_name, windows
from loraplex.server.engine.batch import Batch
from loraplex.server.engine.kv_cache import KVCache, KVCacheShape
from loraplex.server.models.loader import LoadedModel, load_model
from loraplex.server.tokenizer import Tokenizer

EXACT = "float32"
BLOCK = 16
ROWS, LENGTH = 16, 256


@dataclass(frozen=True)
class Quality:
    """One way to hold and compute the model.

    Attributes:
        dtype: of embedding, lm_head, KV cache and adapters.
        perplexity: of the text, `exp` of the mean negative log likelihood of its tokens.
        of_exact: perplexity over that in float32.
        kl: mean Kullback-Leibler divergence of its distributions from float32's, in nats.
        same_choice: share of positions where the most likely token is float32's.
    """

    name: str
    dtype: str
    perplexity: float
    of_exact: float
    kl: float
    same_choice: float


class Windows:
    """Some equally long token sequences over one cache of `model`, a step for all of them at a time."""

    def __init__(self, model: LoadedModel, rows: Sequence[Sequence[int]]) -> None:
        config = model.decoder.config
        self._decoder = model.decoder
        self._tokens = torch.tensor(rows)
        self._blocks = -(-self._tokens.shape[1] // BLOCK)
        shape = KVCacheShape(config.num_layers, config.num_kv_heads, config.head_dim, BLOCK, model.dtype)
        self._cache = KVCache(shape, len(rows) * self._blocks, torch.device("cpu"))

    def logits(self, position: int) -> torch.Tensor:
        """Compute the tokens at `position`, after all before it; return (rows, vocab) in float32."""
        rows = self._tokens.shape[0]
        tables = torch.arange(rows * self._blocks, dtype=torch.int32).view(rows, self._blocks)
        batch = Batch(
            token_ids=self._tokens[:, position],
            positions=torch.full((rows,), position),
            slot_mapping=tables[:, position // BLOCK].long() * BLOCK + position % BLOCK,
            query_start=torch.arange(rows + 1, dtype=torch.int32),
            context_lens=torch.full((rows,), position + 1, dtype=torch.int32),
            block_tables=tables,
            logits_indices=torch.arange(rows),
            num_decodes=rows,
            query_lens_cpu=(1,) * rows,
            context_lens_cpu=(position + 1,) * rows,
            lora=None,
        )
        with torch.inference_mode():
            return self._decoder.forward(batch, self._cache, None).float()


class Tally:
    """Sums over positions for one model."""

    def __init__(self) -> None:
        self.loss = self.kl = self.same = 0.0
        self.count = 0

    def add(self, logits: torch.Tensor, exact: torch.Tensor, following: torch.Tensor) -> None:
        """Take one position of all rows: (rows, vocab) twice and the tokens (rows,) that came next."""
        log_q, log_p = logits.double().log_softmax(-1), exact.double().log_softmax(-1)
        self.loss -= float(log_q.gather(1, following[:, None]).sum())
        self.kl += float((log_p.exp() * (log_p - log_q)).sum())
        self.same += float((logits.argmax(-1) == exact.argmax(-1)).sum())
        self.count += len(following)


def measure_quality(
    model: Path,
    quantizations: Sequence[str],
    rows: int = ROWS,
    length: int = LENGTH,
    on_step: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:
    """Return the qualities of `quantizations` ("none" is the weights as they are, in the dtype that serves).

    All models take each step together, so no logits are kept; `on_step` hears how many of `length` are done.

    Raises:
        ModelLoadError: if the model cannot be loaded.
        TextMissingError: if the text is not installed.
        ValueError: if the text is too short.
    """
    text = windows(Tokenizer.load(model).encode(fixed_text()), rows, length)
    models = {EXACT: load_model(str(model), quantization="none", dtype="float32", max_model_len=0)}
    models |= {name: load_model(str(model), quantization=name) for name in quantizations}
    readers = {name: Windows(loaded, text) for name, loaded in models.items()}
    tallies = {name: Tally() for name in models}
    following = torch.tensor(text)
    for position in range(length - 1):
        exact = readers[EXACT].logits(position)
        for name, reader in readers.items():
            logits = exact if name == EXACT else reader.logits(position)
            tallies[name].add(logits, exact, following[:, position + 1])
        on_step(position + 1)
    dtypes = {name: str(loaded.dtype).removeprefix("torch.") for name, loaded in models.items()}
    qualities = [_quality(name, dtypes[name], tally, tallies[EXACT]) for name, tally in tallies.items()]
    facts = {"text": text_name(), "windows": rows, "tokens": rows * (length - 1)}
    return {**facts, "qualities": [asdict(quality) for quality in qualities]}


def quality_table(document: Mapping[str, Any]) -> Table:
    """Show what `measure_quality` returned."""
    table = Table(title=f"Against float32, {document['tokens']} tokens of {document['text']}")
    table.add_column("weights")
    for column in ("cache and embedding", "perplexity", "of float32", "mean KL, nats", "same first choice"):
        table.add_column(column, justify="right")
    for each in document["qualities"]:
        table.add_row(
            each["name"],
            each["dtype"],
            f"{each['perplexity']:.3f}",
            f"{each['of_exact']:.4f}",
            f"{each['kl']:.2e}",
            f"{each['same_choice']:.1%}",
        )
    return table


def _quality(name: str, dtype: str, tally: Tally, exact: Tally) -> Quality:
    loss, of_exact = (sums.loss / sums.count for sums in (tally, exact))
    return Quality(
        name, dtype, math.exp(loss), math.exp(loss - of_exact), tally.kl / tally.count, tally.same / tally.count
    )
