"""The Zarr store of a catalog that is not on a local disk: nothing that is read from it is waited for longer than its time."""

from __future__ import annotations

import asyncio
import logging
from typing import Any, Self

import zarr
from zarr.abc.store import ByteRequest, RangeByteRequest, Store
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import FsspecStore, WrapperStore

from cmacc.shards.remote import Stalled, limit_s

log = logging.getLogger(__name__)

_FILE_BYTES = 8 << 20  # of a column, before compression


def remote_store(url: str, patience: float, *, read_only: bool) -> Store:
    """The store at an fsspec URL. patience: seconds that a file, or a range of one, may take to come, besides the time its
    bytes need on a slow line; then the request is cancelled and Stalled raised."""
    # a listing that is kept would not show columns that were added since
    return _Patient(FsspecStore.from_url(url, {"use_listings_cache": False}, read_only=read_only), patience)


class _Patient(WrapperStore[FsspecStore]):
    def __init__(self, store: FsspecStore, patience: float) -> None:
        super().__init__(store)
        self._patience = patience

    def _with_store(self, store: FsspecStore) -> Self:
        return type(self)(store, self._patience)

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        size = _FILE_BYTES if byte_range is None and not key.endswith("zarr.json") else 0
        if isinstance(byte_range, RangeByteRequest):
            size = byte_range.end - byte_range.start
        at_once: Any = zarr.config.get("async.concurrency")  # of which each may have a share of the line
        time = asyncio.timeout(limit_s(self._patience, size * int(at_once or 1)))
        began = asyncio.get_running_loop().time()
        try:
            async with time:
                return await super().get(key, prototype, byte_range)
        except TimeoutError as e:
            if not time.expired():
                raise  # of the store's own
            seconds = asyncio.get_running_loop().time() - began
            log.warning("%s did not come within %.3g s", self._store.fs.unstrip_protocol(f"{self._store.path}/{key}"), seconds)
            raise Stalled(seconds) from e
