"""The catalog of a re-sharded data set, put together from the columns of its sources."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from cmacc.shards.catalog import Catalog, Ragged
from cmacc.shards.catalog_writer import Column
from cmacc.shards.choice import Plan
from cmacc.shards.columns import FACTS, LISTS
from cmacc.shards.dataset import Dataset
from cmacc.shards.gather import gather, gather_dense
from cmacc.shards.layout import Layout

log = logging.getLogger(__name__)


def catalog_columns(
    datasets: Sequence[Dataset],
    plan: Plan,
    layout: Layout,
    members: Sequence[str],
    json_sha256: Sequence[NDArray[np.uint8] | None],
) -> tuple[dict[str, Column], dict[str, list[str]]]:
    """All built-in columns of the new catalog, and the vocabularies of those that are coded."""
    columns: dict[str, Column] = {
        "shard": np.repeat(np.arange(layout.count, dtype=np.int32), np.diff(layout.begin)),
        "offset": layout.offset,
        "size": layout.size,
        "fingerprint": gather_dense(datasets, plan.source, plan.row, "fingerprint"),
    }
    if json_sha256 and json_sha256[0] is not None:
        fresh = np.concatenate([d for d in json_sha256 if d is not None])[:, None]
        columns["sha256"] = np.concatenate([layout.sha256[:, : len(members) - 1], fresh], axis=1)
    else:
        columns["sha256"] = layout.sha256
    for name in FACTS:
        columns[name] = gather_dense(datasets, plan.source, plan.row, name)
    for name in ("key", "source", "duplicate_of"):
        texts = layout.keys if name == "key" else gather(datasets, plan.source, plan.row, name)
        offsets = np.frombuffer(texts.buffers()[1], dtype=np.int64)[texts.offset : texts.offset + len(texts) + 1]
        values = np.frombuffer(texts.buffers()[2] or b"", dtype=np.uint8)
        columns[name] = Ragged(values[offsets[0] : offsets[-1]], offsets - offsets[0])
    keyframes = gather(datasets, plan.source, plan.row, "keyframes")
    columns["keyframes"] = Ragged(*_flat(keyframes))
    labels = gather(datasets, plan.source, plan.row, "labels")
    coded = pc.dictionary_encode(labels.flatten())
    columns["labels"] = Ragged(np.asarray(coded.indices, dtype=np.int32), _flat(labels)[1])
    words = {"labels": coded.dictionary.to_pylist()}
    if plan.split is None:
        split = pc.dictionary_encode(gather(datasets, plan.source, plan.row, "split"))
        columns["split"], words["split"] = np.asarray(split.indices, dtype=np.int16), split.dictionary.to_pylist()
    else:
        columns["split"], words["split"] = plan.split, list(plan.splits)
    assert set(columns) >= {*FACTS, *LISTS}
    return columns, words


def _flat(lists: pa.Array) -> tuple[NDArray[Any], NDArray[np.int64]]:
    lengths = np.asarray(pc.list_value_length(lists), dtype=np.int64)
    return np.asarray(lists.flatten()), np.r_[np.int64(0), np.cumsum(lengths)]


def carry_columns(datasets: Sequence[Dataset], plan: Plan, out: Catalog) -> None:
    """Add to `out` the columns that all sources had added, rows in its order."""
    for name in sorted(set.intersection(*(set(d.catalog.added) for d in datasets))):
        if len({(d.catalog.shape(name)[1:], d.catalog.column(name, slice(0, 0)).dtype) for d in datasets}) > 1:
            log.warning("column %s is left out: its shape or type differs between the sources", name)
            continue
        values = gather_dense(datasets, plan.source, plan.row, name)
        out.add_column(name, values, datasets[0].catalog.attrs(name), replace=True)
