"""How a block's content is named: a hash chained over the blocks before it."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable
from typing import NamedTuple

DIGEST_BYTES = 16


class PrefixKey(NamedTuple):
    """What the keys and values of a prompt depend on besides its tokens: prefixes are shared under equal keys only."""

    model: str  # its configuration and the cache's dtype
    adapter: str | None = None
    salt: str | None = None  # the request's cache_salt


# What a prefix hangs on: for the first block its key, for another one the serial of the content before it.
Link = PrefixKey | int


class PrefixBlock(NamedTuple):
    """One full block of a sequence: its own tokens, and a hash of them and all before them."""

    digest: bytes
    parent_digest: bytes
    tokens: bytes  # int32


class PrefixHasher:
    """Splits sequences into PrefixBlocks.

    hash_block(parent_digest, data) -> digest. The default can't be led to collide on purpose, which Python's hash()
    can; what it finds is compared all the same.
    """

    def __init__(self, block_size: int, hash_block: Callable[[bytes, bytes], bytes] | None = None):
        self.block_size = block_size  # tokens
        self.hash_block = hash_block or _blake2b

    def extend(self, blocks: list[PrefixBlock], token_ids: list[int], key: PrefixKey) -> None:
        """Add to `blocks`, which hold the first blocks of token_ids, those that are full since."""
        start = len(blocks) * self.block_size
        end = len(token_ids) // self.block_size * self.block_size
        if start == end:
            return
        # The key's parts are told apart whatever they hold: repr puts them in quotes.
        digest = blocks[-1].digest if blocks else self.hash_block(b"", repr(key).encode())
        data = array("i", token_ids[start:end]).tobytes()
        num_bytes = self.block_size * 4
        for i in range(0, len(data), num_bytes):
            tokens = data[i : i + num_bytes]
            parent_digest, digest = digest, self.hash_block(digest, tokens)
            blocks.append(PrefixBlock(digest, parent_digest, tokens))


def _blake2b(parent_digest: bytes, data: bytes) -> bytes:
    return hashlib.blake2b(parent_digest + data, digest_size=DIGEST_BYTES).digest()
