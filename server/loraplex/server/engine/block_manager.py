"""Who owns which KV block, and which full blocks can be reused by an equal prefix.

Blocks are reference-counted. A full block that nobody uses any more keeps its content and its key until the block is
needed for something else (least recently freed first). The key of a block is chained over everything its keys and
values depend on: the base, the cache salt, all tokens up to its end, and the effective weights with the token on which
they begin to act. Blocks wholly before that token are the base's own, whoever computed them. Source of the scheme:
vLLM's automatic prefix caching; the digest in the key is ours, so that adapters never share (PEERS.md, 3.8 and 3.9).

Knows nothing about tensors.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np

from loraplex.server.engine.sequence import Sequence

BlockKey = bytes


@dataclass
class Block:
    """One block's state; `key` is set once its content is complete and may be reused."""

    block_id: int
    ref_count: int = 0
    key: BlockKey | None = None


class BlockManager:
    """Allocates, shares and frees blocks of `block_size` tokens."""

    def __init__(self, num_blocks: int, block_size: int, *, base_fingerprint: str = "", caching: bool = True) -> None:
        """Make `num_blocks` free blocks.

        Raises:
            ValueError: if a number is not positive.
        """
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"need at least one block of at least one token, got {num_blocks} of {block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._caching = caching
        self._base = base_fingerprint.encode()
        self._blocks = [Block(i) for i in range(num_blocks)]
        # Free blocks, next to be taken first: never-used ones, then the least recently freed.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._by_key: dict[BlockKey, int] = {}

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no sequence holds; some of them may still serve the prefix cache."""
        return len(self._free)

    @property
    def usage(self) -> float:
        """Share of the blocks that sequences hold, 0 to 1."""
        return 1 - len(self._free) / self.num_blocks

    def blocks_for(self, num_tokens: int) -> int:
        """Return how many blocks `num_tokens` tokens fill."""
        return -(-num_tokens // self.block_size)

    def match_prefix(self, seq: Sequence) -> int:
        """Give a sequence without blocks the cached blocks of its longest known prefix; return the tokens they hold.

        The last token is always left to compute, because its logits are wanted.
        """
        assert not seq.block_table, "a sequence that holds blocks cannot start over"
        if not self._caching:
            return 0
        usable = (len(seq.token_ids) - 1) // self.block_size
        key = self._root_key(seq)
        for index in range(usable):
            key = self._next_key(key, seq, index)
            block_id = self._by_key.get(key)
            if block_id is None:
                break
            self._acquire(block_id)
            seq.block_table.append(block_id)
        found = len(seq.block_table) * self.block_size
        seq.num_computed_tokens = found
        return found

    def grow(self, seq: Sequence, num_tokens: int, spare: int = 0) -> bool:
        """Make room in `seq` for its first `num_tokens` tokens.

        Return False, with nothing changed, if there are not enough free blocks for that with `spare` left over.
        """
        needed = self.blocks_for(num_tokens) - len(seq.block_table)
        if needed > 0 and needed + spare > len(self._free):
            return False
        for _ in range(needed):
            seq.block_table.append(self._take_free())
        return True

    def publish(self, seq: Sequence, old_computed: int) -> None:
        """Make blocks that were filled since `old_computed` tokens were computed available to equal prefixes."""
        if not self._caching:
            return
        first, last = old_computed // self.block_size, seq.num_computed_tokens // self.block_size
        if first == last:
            return
        previous = self._blocks[seq.block_table[first - 1]].key if first else None
        key = previous if previous is not None else self._key_upto(seq, first)
        for index in range(first, last):
            key = self._next_key(key, seq, index)
            block = self._blocks[seq.block_table[index]]
            # Another block may hold the same content already; that one stays the shared one, and this one keyless.
            if block.key is None and key not in self._by_key:
                block.key = key
                self._by_key[key] = block.block_id

    def free(self, seq: Sequence) -> None:
        """Give back all blocks of `seq`."""
        # Last blocks first: a prefix is worth more than its continuation.
        for block_id in reversed(seq.block_table):
            block = self._blocks[block_id]
            assert block.ref_count > 0, f"block {block_id} is freed twice"
            block.ref_count -= 1
            if block.ref_count == 0:
                self._free[block_id] = None
                if block.key is None:
                    self._free.move_to_end(block_id, last=False)
        seq.block_table.clear()
        seq.num_computed_tokens = 0

    def check_integrity(self, sequences: Seq[Sequence]) -> None:
        """Check that reference counts, free list and keys agree with the block tables of all living sequences.

        Raises:
            AssertionError: naming what disagrees.
        """
        counts = [0] * self.num_blocks
        for seq in sequences:
            for block_id in seq.block_table:
                counts[block_id] += 1
        for block in self._blocks:
            assert block.ref_count == counts[block.block_id], f"{block} is held {counts[block.block_id]} times"
            assert (block.ref_count == 0) == (block.block_id in self._free), f"{block}: free list disagrees"
            if block.key is not None:
                assert self._by_key.get(block.key) == block.block_id, f"{block}: its key leads elsewhere"
        assert all(self._blocks[i].key == key for key, i in self._by_key.items()), "a key without its block"

    def _acquire(self, block_id: int) -> None:
        block = self._blocks[block_id]
        if block.ref_count == 0:
            del self._free[block_id]
        block.ref_count += 1

    def _take_free(self) -> int:
        block_id, _ = self._free.popitem(last=False)
        block = self._blocks[block_id]
        if block.key is not None:
            del self._by_key[block.key]
            block.key = None
        block.ref_count = 1
        return block_id

    def _root_key(self, seq: Sequence) -> BlockKey:
        return _hash(b"root", self._base, seq.request.cache_salt.encode())

    def _next_key(self, key: BlockKey, seq: Sequence, index: int) -> BlockKey:
        """Return the key of a block from that of the block before it."""
        digest, scale = seq.adapter_key
        if digest is not None and index == seq.adapter_start // self.block_size:
            key = _hash(b"adapter", key, digest.encode(), repr(scale).encode(), b"%d" % seq.adapter_start)
        tokens = seq.token_ids[index * self.block_size : (index + 1) * self.block_size]
        return _hash(b"tokens", key, np.asarray(tokens, dtype=np.int64).tobytes())

    def _key_upto(self, seq: Sequence, num_blocks: int) -> BlockKey:
        key = self._root_key(seq)
        for index in range(num_blocks):
            key = self._next_key(key, seq, index)
        return key


def _hash(*parts: bytes) -> BlockKey:
    hasher = hashlib.blake2b(digest_size=16)
    for part in parts:
        # The length keeps ("ab", "c") apart from ("a", "bc").
        hasher.update(len(part).to_bytes(4, "little") + part)
    return hasher.digest()
