"""Is a data set what it says it is? Every fault is one sentence: what, where, how to mend."""

from __future__ import annotations

import json
import os
import re
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import PurePosixPath
from typing import Any

import fsspec
import numpy as np

from cmacc.shards.catalog_writer import CATALOG
from cmacc.shards.dataset import META, Dataset
from cmacc.shards.errors import DatasetError
from cmacc.shards.facts import facts_from_json
from cmacc.shards.index import clips, scan
from cmacc.shards.lint.catalog import CatalogLint
from cmacc.shards.lint.columns import added_faults, metadata_faults
from cmacc.shards.lint.faults import Fault, few
from cmacc.shards.lint.media import media_faults
from cmacc.shards.lint.shard import Found, read_shard

__all__ = ["Fault", "lint"]

_OURS = re.compile(r"clips-\d{6}\.(tar|idx|tar\.idx)")
_LEFT = re.compile(r"\..+\.part|.+\.partial|\.reshard.*")
_PAIRS = 20
_THREADS = 4


def lint(
    url: str | os.PathLike[str],
    *,
    samples: int = 64,
    seed: int = 0,
    checksums: bool = True,
    on_progress: Callable[[int], None] | None = None,
) -> list[Fault]:
    """All faults found in a data set (local or any fsspec URL); an empty list means none. Of many alike, the first ten.

    samples: how many clips are decoded (all of them when there are no more than that).
    checksums: also read every shard whole, once, and compare its sha256 and those of its members.
    on_progress: called now and then with the bytes of shards that are done, by one thread at a time.
    Of shards made elsewhere only what a reader needs is asked: that their bytes are those that were indexed, that catalog rows
    point at members of the right names, and that these can be decoded.
    """
    try:
        dataset = Dataset.open(url)
    except DatasetError as e:
        return [Fault("dataset", str(url), str(e))]
    files, path = fsspec.core.url_to_fs(dataset.url)
    faults = [*_description(files, path), *_strays(dataset, files, path), *few(metadata_faults(dataset, files, path), CATALOG)]
    shards, catalog, whole = dataset.meta.shards, CatalogLint(dataset), []
    tell = _Told(on_progress)

    def read(number: int) -> Found:
        return read_shard(files, path, dataset.meta, shards[number], checksums, tell)

    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        for number, found in enumerate(_in_turn(pool, read, range(len(shards)))):
            faults += found.faults
            whole.append(found.whole)
            faults += catalog.take(number, found, last=number == len(shards) - 1)
        faults += [*_names(dataset, catalog, files, path), *added_faults(dataset, files, path)]
        rows = _draw(np.flatnonzero(np.repeat(whole, [s.clips for s in shards])), samples, seed)
        for some in _in_turn(pool, lambda row: _media(dataset, row), rows.tolist()):
            faults += some
    return faults


class _Told:
    """Adds up bytes that several threads have done."""

    def __init__(self, on_progress: Callable[[int], None] | None) -> None:
        self._on_progress, self._done, self._lock = on_progress, 0, threading.Lock()

    def __call__(self, more: int) -> None:
        if self._on_progress:
            with self._lock:
                self._done += more
                self._on_progress(self._done)


def _in_turn(pool: ThreadPoolExecutor, work: Callable[[int], Any], numbers: Any) -> Iterator[Any]:
    """Results in the order of `numbers`; no more than a few are begun ahead, so that memory stays flat."""
    left = iter(numbers)
    begun: deque[Future[Any]] = deque(pool.submit(work, n) for n in islice(left, _THREADS))
    while begun:
        done = begun.popleft().result()
        begun.extend(pool.submit(work, n) for n in islice(left, 1))
        yield done


def _draw(rows: Any, samples: int, seed: int) -> Any:
    if len(rows) <= samples:
        return rows
    draws = np.random.Philox(key=np.array([seed, 0], dtype=np.uint64)).random_raw(len(rows))
    return np.sort(rows[np.argsort(draws, kind="stable")[:samples]])


def _media(dataset: Dataset, row: int) -> list[Fault]:
    try:
        return list(media_faults(dataset, row))
    except Exception as e:  # a catalog that cannot be read makes zarr raise anything
        said = " ".join(f"row {row} of the catalog cannot be read ({type(e).__name__}: {e})".split())
        return [Fault("catalog", CATALOG, f"{said}; the faults of its columns say how to mend it")]


def _description(files: Any, path: str) -> Iterator[Fault]:
    raw = files.cat_file(f"{path}/{META}")
    if raw != (json.dumps(json.loads(raw), sort_keys=True, indent=1) + "\n").encode():
        yield Fault("dataset", META, f"{META} is not as a writer writes it: a byte of it changed; restore it from a copy")


def _strays(dataset: Dataset, files: Any, path: str) -> Iterator[Fault]:
    names = {s.name for s in dataset.meta.shards}
    for found in _listed(files, path):
        if not dataset.meta.foreign and _OURS.fullmatch(found) and f"{found.partition('.')[0]}.tar" not in names:
            yield Fault("stray", found, f"{found} is not named in {META}; a writer that opens the data set removes it")
        elif _LEFT.fullmatch(found):
            said = f"{found} was left by a writer or a `cmacc reshard` that was interrupted"
            yield Fault("stray", found, f"{said}; run the same command again to continue it, or delete {found}")
    for found in _listed(files, f"{path}/{CATALOG}"):
        if _LEFT.fullmatch(found):
            yield Fault("stray", f"{CATALOG}/{found}", f"{CATALOG}/{found} was left by a writer that was interrupted; delete it")


def _listed(files: Any, path: str) -> list[str]:
    try:
        return sorted(PurePosixPath(f).name for f in files.ls(path, detail=False))
    except FileNotFoundError:
        return []


def _names(dataset: Dataset, catalog: CatalogLint, files: Any, path: str) -> Iterator[Fault]:
    """Keys that are in two shards, sources that are in two splits; their names are read again from the few shards concerned."""
    twice, apart = catalog.twice(), catalog.apart()
    shown: dict[int, tuple[str, str, str, str]] = {}

    def show(row: int) -> tuple[str, str, str, str]:
        if row not in shown:
            shown[row] = _row(dataset, row, files, path)
        return shown[row]

    for first, second in twice[:_PAIRS]:
        (one, key, _, _), (other, _, _, _) = show(first), show(second)
        if one != other:  # within a shard it has been said
            said = f"clip {key} of {other} is in {one} too"
            yield Fault("duplicate", f"{other}: {key}", f"{said}; `cmacc reshard` leaves the second out")
    for first, second in apart[:_PAIRS]:
        (_, key, source, split), (other, another, _, another_split) = show(first), show(second)
        said = f"source video {source} is in two splits: clip {key} in {split}, clip {another} in {another_split}"
        yield Fault("split", f"{other}: {another}", f"{said}; give new ones by `cmacc reshard --split train:0.9,val:0.1`")
    for code, pairs in (("duplicate", twice), ("split", apart)):
        if len(pairs) > _PAIRS:
            yield Fault(
                code, META, f"there are {len(pairs) - _PAIRS} more faults of the kind {code!r}; mend the first, and lint again"
            )


def _row(dataset: Dataset, row: int, files: Any, path: str) -> tuple[str, str, str, str]:
    """Shard, key, source and split of a clip, as its shard has them; of foreign shards as the catalog has them."""
    number = int(dataset.shard_of_row[row])
    name, at = dataset.meta.shards[number].name, row - int(np.searchsorted(dataset.shard_of_row, number))
    if dataset.meta.foreign:
        facts = dataset.catalog.facts(slice(row, row + 1))[0]
        return name, str(dataset.catalog.texts("key", slice(row, row + 1))[0]), facts.source, facts.split
    with files.open(f"{path}/{name}", "rb") as file:
        key, group = clips(scan(file))[at]
        member = next(m for m in group if m.extension == "json")
        file.seek(member.offset)
        try:
            facts = facts_from_json(file.read(member.size))
        except ValueError:
            return name, key, "", ""
    return name, key, facts.source, facts.split
