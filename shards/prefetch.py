"""Reading ahead in a thread of its own: what a loader wants soon is in the cache, or on its way from the disk, when it asks."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Sequence
from types import TracebackType

from cmacc.shards.dataset import Dataset

_BYTES_AT_ONCE = 32 << 20  # between two looks at whether others are wanted by now


class Prefetcher:
    """One daemon thread that calls `Dataset.prefetch` for the spans it was last told of, the first ones first.

    `advance` may be called after a fork, too: the child gets a thread of its own. Closed as a context manager, or by `close`.
    """

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        self._pid = 0  # of the process that the thread is in
        self._closed = False

    def advance(self, spans: Sequence[tuple[int, int, int]]) -> None:
        """Bytes `begin` to `end` of some shards, (shard number, begin, end), will be wanted soon, in this order. What was asked
        for before and has not begun is forgotten. Returns at once; does nothing after `close`."""
        if self._closed:
            return
        if self._pid != os.getpid():
            self._changed = threading.Condition()
            self._queue: deque[tuple[int, int, int]] = deque()
            self._thread = threading.Thread(target=self._work, name="prefetch", daemon=True)
            self._pid = os.getpid()
            self._thread.start()
        with self._changed:
            self._queue.clear()
            self._queue.extend(spans)
            self._changed.notify()

    def close(self) -> None:
        """Forget what is queued. What is being fetched comes to its end by itself, and the thread with it."""
        self._closed = True
        if self._pid == os.getpid():
            with self._changed:
                self._queue.clear()
                self._changed.notify()

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._queue and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
                some = self._next()
            self._dataset.prefetch(some)

    def _next(self) -> list[tuple[int, int, int]]:
        """Taken from the front of the queue; a long span is taken piece by piece."""
        some, left = [], _BYTES_AT_ONCE
        while self._queue and left > 0:
            shard, begin, end = self._queue.popleft()
            upto = min(end, begin + left)
            some.append((shard, begin, upto))
            if upto < end:
                self._queue.appendleft((shard, upto, end))
            left -= max(upto - begin, 1)
        return some
