"""Shards read by way of the cache: what it lacks is fetched in whole blocks, each by one thread for all that want it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import CancelledError, Future
from typing import NamedTuple, Protocol

from cmacc.shards.cache import Cache
from cmacc.shards.remote import Span

_AT_ONCE = 16  # blocks that are fetched together and are in memory
_AHEAD_AT_ONCE = 8  # of those that are only wanted soon, for whom it may become urgent


class _Shard(Protocol):
    @property
    def sha256(self) -> str: ...
    @property
    def bytes(self) -> int: ...


class Block(NamedTuple):
    """A block of a shard, both by number."""

    shard: int
    number: int


class Blocks:
    """The blocks of one data set's shards. Of one process: after a fork make a new one.

    fetch: brings the bytes of some spans, straight from the store, or raises.
    """

    def __init__(self, cache: Cache, shards: Sequence[_Shard], fetch: Callable[[list[Span]], list[bytes]]) -> None:
        self._cache, self._shards, self._fetch = cache, shards, fetch
        self._lock = threading.Lock()
        self._coming: dict[Block, Future[bytes]] = {}

    def read(self, spans: Sequence[Span]) -> list[bytes]:
        """Bytes of each span. Raises what `fetch` raises, in whichever thread it fetched the block."""
        pieces: list[list[bytes | None]] = []
        lacking: dict[Block, list[tuple[int, int, int, int]]] = {}  # which piece, and which bytes of the block
        for i, span in enumerate(spans):
            found = list[bytes | None]()
            for block in self._touched(span):
                begin, size = block.number * self._cache.block_bytes, self._size(block)
                inner = max(span.begin - begin, 0), min(span.end - begin, size)
                found.append(self._cache.get(self._shards[span.file].sha256, block.number, size, *inner))
                if found[-1] is None:
                    lacking.setdefault(block, []).append((i, len(found) - 1, *inner))
            pieces.append(found)
        wanted = list(lacking)
        for first in range(0, len(wanted), _AT_ONCE):
            some = wanted[first : first + _AT_ONCE]
            mine, others = self._claim(some)
            for block, coming in [*self._bring(mine), *others]:
                try:
                    data = coming.result()
                except CancelledError:  # the other thread was interrupted
                    data = self._fetch([self._span(block)])[0]
                for i, piece, begin, end in lacking[block]:
                    pieces[i][piece] = data[begin:end]
        return [found[0] if len(found) == 1 and found[0] is not None else b"".join(p or b"" for p in found) for found in pieces]

    def prefetch(self, spans: Iterable[Span]) -> None:
        """Bring the blocks of these spans into the cache, those first that come first, and no more than it can keep. Raises
        what `fetch` raises."""
        wanted, lacking = dict.fromkeys(block for span in spans for block in self._touched(span)), []
        for number, block in enumerate(wanted, 1):
            if not self._cache.holds(number * self._cache.block_bytes):
                break
            if not self._cache.has(self._shards[block.shard].sha256, block.number, self._size(block)):
                lacking.append(block)
        for first in range(0, len(lacking), _AHEAD_AT_ONCE):
            mine, _ = self._claim(lacking[first : first + _AHEAD_AT_ONCE])
            for _, coming in self._bring(mine):
                coming.result()

    # --- inside ---

    def _touched(self, span: Span) -> Iterable[Block]:
        step = self._cache.block_bytes
        return (Block(span.file, n) for n in (range(span.begin // step, -(-span.end // step)) if span.begin < span.end else ()))

    def _size(self, block: Block) -> int:
        step = self._cache.block_bytes
        return min(step, self._shards[block.shard].bytes - block.number * step)

    def _span(self, block: Block) -> Span:
        begin = block.number * self._cache.block_bytes
        return Span(block.shard, begin, begin + self._size(block))

    def _claim(self, blocks: Sequence[Block]) -> tuple[list[Block], list[tuple[Block, Future[bytes]]]]:
        """Those that are now ours to fetch, and those that come already. What is ours has to be brought at once."""
        mine, others = [], []
        with self._lock:
            for block in blocks:
                if block in self._coming:
                    others.append((block, self._coming[block]))
                else:
                    self._coming[block] = Future()
                    mine.append(block)
        return mine, others

    def _bring(self, mine: Sequence[Block]) -> list[tuple[Block, Future[bytes]]]:
        """Fetch and keep what was claimed; each block with its bytes, or with why they did not come."""
        claimed = [(block, self._coming[block]) for block in mine]
        try:
            lacking = []
            for block, coming in claimed:
                shard, size = self._shards[block.shard], self._size(block)
                there = self._cache.get(shard.sha256, block.number, size, 0, size)  # another thread was quicker
                coming.set_result(there) if there is not None else lacking.append((block, coming))
            spans = [self._span(block) for block, _ in lacking]
            for (block, coming), data in zip(lacking, self._fetch(spans) if spans else [], strict=True):
                self._cache.put(self._shards[block.shard].sha256, block.number, data)
                coming.set_result(data)
        except BaseException as e:
            for _, coming in claimed:
                if not coming.done() and isinstance(e, Exception):
                    coming.set_exception(e)
            if not isinstance(e, Exception):
                raise
        finally:
            with self._lock:
                for block, coming in claimed:
                    del self._coming[block]
                    coming.cancel()  # nothing, where it has come
        return claimed
