"""Which clips of a data set an SQL expression picks, asked of DuckDB over the catalog's columns."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

import duckdb
import numpy as np
from numpy.typing import NDArray

from cmacc.shards.columns import FACTS, TEXTS
from cmacc.shards.dataset import Dataset
from cmacc.shards.errors import DatasetError

_OWN = ("key", "source", "split", "labels", "keyframes", "bytes", "shard", *FACTS, "duplicate_of")


def query_columns(dataset: Dataset) -> list[str]:
    """Columns an expression may name: labels VARCHAR[], keyframes INTEGER[], bytes (of all members), facts, added ones (n,)."""
    catalog = dataset.catalog
    return [*_OWN, *(c for c in catalog.added if c.isidentifier() and catalog.shape(c) == (len(dataset),))]


def column_values(dataset: Dataset, name: str) -> NDArray[Any]:
    """Values of one of `query_columns`, (n,): numbers, strings, or lists (dtype object). Raises DatasetError for another name."""
    if name not in query_columns(dataset):
        raise DatasetError(f"{dataset.url} has no column {name!r} to ask for; there are {', '.join(query_columns(dataset))}")
    catalog = dataset.catalog
    if name in TEXTS:
        return catalog.texts(name)
    if name == "bytes":
        return np.asarray(catalog.column("size").sum(axis=1))
    if name in ("labels", "keyframes"):
        lists = np.empty(len(dataset), dtype=object)
        if name == "labels":
            lists[:] = [list(labels) for labels in catalog.labels()]
        else:
            values, offsets = catalog.ragged(name)
            lists[:] = [values[a:b].tolist() for a, b in pairwise(offsets)]
        return lists
    return catalog.column(name)


def matching(dataset: Dataset, where: str | None) -> NDArray[np.int64]:
    """Row numbers, ascending, for which the SQL expression `where` is true, e.g. `duration_s >= 10 and 'dog' in labels`.

    The expression is all that DuckDB takes: no statement, and no way to files, the network or Python's variables.
    Raises DatasetError with DuckDB's reason and the columns there are.
    """
    rows = np.arange(len(dataset), dtype=np.int64)
    if where is None or not len(rows):
        return rows
    # only columns that are named are read: the others of ten million rows stay where they are
    words = {word.lower() for word in re.findall(r"\w+", where)}
    named = {c: column_values(dataset, c) for c in query_columns(dataset) if c.lower() in words}
    table = {c: v.astype(object) if v.dtype.kind == "T" else v for c, v in named.items()}
    with duckdb.connect(":memory:") as db:
        db.register("columns", {"row": rows, **table})
        db.execute("CREATE TABLE clips AS SELECT * FROM columns")
        db.unregister("columns")
        for setting in ("python_enable_replacements = false", "enable_external_access = false", "lock_configuration = true"):
            db.execute(f"SET {setting}")
        try:
            found = db.table("clips").filter(duckdb.SQLExpression(where)).project("row").fetchnumpy()["row"]
        except duckdb.Error as e:
            reason = str(e).splitlines()[0].strip()
            known = ", ".join(query_columns(dataset))
            raise DatasetError(f"where {where!r} is not understood: {reason}; columns are {known}") from e
    return np.sort(np.asarray(found, dtype=np.int64))
