"""Which clips of a data set an SQL expression picks, asked of DuckDB over the catalog's columns."""

from __future__ import annotations

import re

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from cmacc.shards.columns import FACTS
from cmacc.shards.dataset import Dataset
from cmacc.shards.errors import DatasetError

_OWN = ("key", "source", "split", "labels", "keyframes", "bytes", "shard", *FACTS, "duplicate_of")
_SETTINGS = ("python_enable_replacements = false", "enable_external_access = false", "lock_configuration = true")


def query_columns(dataset: Dataset) -> list[str]:
    """Columns an expression may name: labels VARCHAR[], keyframes INTEGER[], bytes (of all members), facts, added ones (n,)."""
    catalog = dataset.catalog
    return [*_OWN, *(c for c in catalog.added if c.isidentifier() and catalog.shape(c) == (len(dataset),))]


def column_values(dataset: Dataset, name: str) -> pa.Array:
    """Values of one of `query_columns`, (n,), as Arrow has them. Raises DatasetError for another name."""
    if name not in query_columns(dataset):
        raise DatasetError(f"{dataset.url} has no column {name!r} to ask for; there are {', '.join(query_columns(dataset))}")
    if name == "bytes":
        return pa.array(dataset.catalog.column("size").sum(axis=1))
    return dataset.catalog.arrow(name)


def matching(dataset: Dataset, where: str | None) -> NDArray[np.int64]:
    """Row numbers, ascending, for which the SQL expression `where` is true, e.g. `duration_s >= 10 and 'dog' in labels`.

    What was not measured, NaN in the catalog, is NULL here: `loudness_db IS NULL` finds it, and no comparison does.
    The expression is all that DuckDB takes: no statement, and no way to files, the network or Python's variables.
    Raises DatasetError with DuckDB's reason and the columns there are.
    """
    rows = np.arange(len(dataset), dtype=np.int64)
    if where is None or not len(rows):
        return rows
    # only columns that are named are read: the others of ten million rows stay where they are
    words = {word.lower() for word in re.findall(r"\w+", where)}
    if "random" in words and "random" not in query_columns(dataset):
        raise DatasetError(
            f"where {where!r} is another question each time; for clips by chance give order shuffle:SEED and a limit"
        )
    named = {c: _measured(column_values(dataset, c)) for c in query_columns(dataset) if c.lower() in words}
    with duckdb.connect(":memory:") as db:
        for setting in _SETTINGS:
            db.execute(f"SET {setting}")
        try:
            db.register("clips", pa.table({"row": rows, **named}))
            found = db.view("clips").filter(duckdb.SQLExpression(where)).project("row").fetchnumpy()["row"]
        except duckdb.Error as e:
            reason = str(e).splitlines()[0].strip()
            known = ", ".join(query_columns(dataset))
            raise DatasetError(f"where {where!r} is not understood: {reason}; columns are {known}") from e
    return np.sort(np.asarray(found, dtype=np.int64))


def _measured(values: pa.Array) -> pa.Array:
    """NaN, for which SQL would have every clip be louder than any limit, as NULL; lists of codes as lists of words."""
    unknown = pc.is_nan(values) if pa.types.is_floating(values.type) else None
    if pa.types.is_large_list(values.type) and pa.types.is_dictionary(values.type.value_type):
        # DuckDB reads no batch of coded lists that are all empty
        return pa.LargeListArray.from_arrays(values.offsets, values.values.cast(pa.large_string()))
    return values if unknown is None or not pc.any(unknown).as_py() else pc.if_else(unknown, None, values)


def sorted_by(datasets: list[Dataset], rows: list[NDArray[np.int64]], name: str) -> NDArray[np.int64]:
    """Positions in the chosen rows of all data sets, ascending by a column, int64; what is equal stays in its order, NaN is last.

    Raises DatasetError for a column that is not there, or that holds lists.
    """
    values = [column_values(d, name).take(pa.array(r)) for d, r in zip(datasets, rows, strict=True)]
    if any(pa.types.is_large_list(v.type) for v in values):
        raise DatasetError(f"order by:{name} makes no sense: {name} holds lists; take a column of numbers or names")
    plain = [v.cast(pa.large_string()) if pa.types.is_dictionary(v.type) else v for v in values]
    return np.asarray(pc.sort_indices(pa.chunked_array(plain)), dtype=np.int64)
