"""A model that is nothing but bookkeeping, so that engine tests run in milliseconds and still see every mistake.

`FakeDecoder` keeps one number a token in the real paged cache: the token id marked with its adapter. A row's next
token is a hash of everything its block table leads to. A wrong block, a stale prefix, a neighbour's adapter or a lost
token therefore changes the text; `expected_tokens` says what it must be.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from loraplex.server.config import EngineConfig
from loraplex.server.engine.batch import Batch
from loraplex.server.engine.block_manager import BlockManager
from loraplex.server.engine.engine import Engine, EngineParts, Publish
from loraplex.server.engine.kv_cache import KVCache, KVCacheShape
from loraplex.server.engine.model_runner import ModelRunner
from loraplex.server.engine.scheduler import Scheduler
from loraplex.server.engine.stats import EngineObserver, NullObserver
from loraplex.server.lora.loads import AdapterLoader
from loraplex.server.lora.ops.interface import LoraContext
from loraplex.server.lora.segments import Segment
from loraplex.server.lora.tiers import AdapterTiers
from loraplex.server.lora.weights import PackedAdapter
from loraplex.server.tokenizer import Tokenizer

VOCAB = 256
EOS = 0


def adapter_mark(digest: str | None, scale: float = 1.0) -> int:
    """What an adapter adds to the number of each of its tokens; 0 for the base."""
    if digest is None:
        return 0
    return 1000 * (1 + int(hashlib.sha256(f"{digest}:{scale}".encode()).hexdigest(), 16) % 1000)


def _next_token(numbers: Sequence[int]) -> int:
    digest = hashlib.sha256(b",".join(str(n).encode() for n in numbers)).digest()
    return 1 + digest[0] % (VOCAB - 1)  # never EOS


def expected_tokens(
    prompt: Sequence[int], count: int, digest: str | None = None, scale: float = 1.0, start: int = 0
) -> list[int]:
    """Return the output that the request must have, whatever else the engine does; the adapter acts from `start` on."""
    mark = adapter_mark(digest, scale)
    numbers = [token + (mark if index >= start else 0) for index, token in enumerate(prompt)]
    for _ in range(count):
        numbers.append(_next_token(numbers) + mark)
    return [number - mark for number in numbers[len(prompt) :]]


@dataclass(frozen=True)
class FakeOps:
    """Hands the segments and their adapters to the decoder as they are."""

    def prepare(
        self, segments: Sequence[Segment], slots: Mapping[int, PackedAdapter]
    ) -> list[tuple[int, int, str, float]]:
        return [(s.start, s.end, slots[s.slot].digest, s.scale) for s in segments]


class FakeDecoder:
    """See the module's text; `fail_on` makes the step that computes that token raise."""

    def __init__(self, fail_on: int | None = None) -> None:
        self.fail_on = fail_on
        self.batch_sizes: list[int] = []
        self.adapters_in_batch: list[int] = []

    def forward(self, batch: Batch, kv_cache: KVCache, lora: LoraContext | None) -> torch.Tensor:
        tokens = batch.token_ids.tolist()
        if self.fail_on in tokens:
            raise RuntimeError("the fake model was told to fail")
        numbers = list(tokens)
        segments = lora.tokens if lora is not None else []
        for start, end, digest, scale in segments:  # type: ignore[attr-defined]
            for index in range(start, end):
                numbers[index] += adapter_mark(digest, scale)
        self.batch_sizes.append(len(batch.query_lens_cpu))
        self.adapters_in_batch.append(len({s[2] for s in segments}))  # type: ignore[attr-defined]
        memory = kv_cache.layers[0].k.view(-1)
        memory[batch.slot_mapping] = torch.tensor(numbers, dtype=memory.dtype)
        logits = torch.zeros(len(batch.logits_indices), VOCAB)
        ends = batch.query_start[1:].tolist()
        for out, index in enumerate(batch.logits_indices.tolist()):
            row = ends.index(index + 1)
            context = int(batch.context_lens[row])
            slots = self._slots(batch.block_tables[row].tolist(), context, kv_cache.shape.block_size)
            logits[out, _next_token([int(n) for n in memory[slots].tolist()])] = 1.0
        return logits

    @staticmethod
    def _slots(table: Sequence[int], context: int, block_size: int) -> list[int]:
        return [table[i // block_size] * block_size + i % block_size for i in range(context)]


def byte_tokenizer() -> Tokenizer:
    """One token a byte; the id is the byte."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    by_byte = dict(zip(range(256), sorted(alphabet), strict=True))
    fast = FastTokenizer(models.BPE(vocab={char: i for i, char in by_byte.items()}, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=fast))


def packed(digest: str, nbytes: int = 1) -> PackedAdapter:
    """An adapter without weights that claims to take `nbytes` bytes."""
    return PackedAdapter(digest=digest, sites=(), nbytes=nbytes, rank=1)


@dataclass(frozen=True)
class Unmovable(PackedAdapter):
    """An adapter that the device refuses as many times as there are `refusals`, each with the next of them."""

    refusals: Iterator[Exception] = field(kw_only=True)

    @classmethod
    def make(cls, digest: str, *refusals: Exception, nbytes: int = 1) -> Unmovable:
        return cls(digest=digest, sites=(), nbytes=nbytes, rank=1, refusals=iter(refusals))

    def to(self, device: torch.device) -> PackedAdapter:
        refusal = next(self.refusals, None)
        if refusal is not None:
            raise refusal
        return self


def make_engine(
    publish: Publish,
    *,
    decoder: FakeDecoder | None = None,
    num_blocks: int = 64,
    capacity: int = 100,
    host_capacity: int = 0,
    load: AdapterLoader = packed,
    observer: EngineObserver | None = None,
    max_model_len: int = 200,
    **config: object,
) -> Engine:
    """Build an engine around a FakeDecoder; each adapter takes one byte of the capacities."""
    settings = {"max_num_seqs": 4, "max_num_batched_tokens": 16, "block_size": 4, **config}
    engine_config = EngineConfig(**settings)  # type: ignore[arg-type]
    blocks = BlockManager(num_blocks, engine_config.block_size, caching=engine_config.enable_prefix_caching)
    slots = AdapterTiers(load, capacity, host_capacity, on_load=lambda: engine.wake())
    shape = KVCacheShape(1, 1, 1, engine_config.block_size, torch.float64)
    device = torch.device("cpu")
    runner = ModelRunner(
        decoder or FakeDecoder(),
        KVCache(shape, num_blocks, device),
        FakeOps(),  # type: ignore[arg-type]
        device,
    )
    parts = EngineParts(
        runner=runner,
        scheduler=Scheduler(engine_config, blocks, slots),
        blocks=blocks,
        slots=slots,
        tokenizer=byte_tokenizer(),
        eos_token_ids=frozenset({EOS}),
        max_model_len=max_model_len,
    )
    engine = Engine(parts, publish, observer or NullObserver())
    return engine
