"""How the columns of a catalog lie on the disk, and what was added to it: a byte that changed in a zarr.json shows here."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cache
from typing import Any

import zarr
from zarr.storage import MemoryStore

from cmacc.shards.catalog_writer import CATALOG
from cmacc.shards.columns import BUILT_IN, CODED, DIGEST, LATER, LISTS, column_digest, create_array, create_columns, row_blocks
from cmacc.shards.dataset import Dataset
from cmacc.shards.lint.faults import Fault

_MEND_ADDED = "write it again by `cmacc embed`, or whatever made it"
_LAYOUT = ("chunk_grid", "codecs")


def mend(dataset: Dataset) -> str:
    """How a catalog is made again."""
    if dataset.meta.foreign:
        return f"make the catalog again by `cmacc index {dataset.url}`"
    return "delete catalog.zarr and open the data set for writing, as `cmacc ingest` does: it is made again from the shards"


def metadata_faults(dataset: Dataset, files: Any, path: str) -> Iterator[Fault]:
    """The zarr.json files: each must be what zarr writes, and describe the columns that this version makes."""
    again = mend(dataset)
    said = dict[str, dict[str, Any]]()
    lacks = set[str]()
    wanted = _as_made(dataset.meta.members)
    with suppress(
        OSError, ValueError, KeyError, TypeError, AttributeError
    ):  # the group's own file is looked at below, like all others
        lacks = set(LATER) - set(_json(files.cat_file(f"{path}/{CATALOG}/zarr.json"))["attributes"].get("later", ()))
    for name in wanted:
        node = name.removesuffix("/zarr.json").removesuffix("zarr.json")
        where = f"{CATALOG}/{name}"
        if node.partition("/")[0] in lacks:
            continue
        try:
            said[name] = _json(files.cat_file(f"{path}/{where}"))
        except FileNotFoundError:
            yield Fault("catalog", where, f"{where} is missing; {again}")
        except (OSError, ValueError) as e:
            yield Fault("catalog", where, f"{where} is not as zarr writes it ({e}); {again}")
    other = [n for n, meta in said.items() if any(meta.get(f) != wanted[n].get(f) for f in _LAYOUT)]
    # an earlier version laid out its columns differently: then all of them are, or most where some came later
    skip = _LAYOUT if len(other) > len(said) / 2 else ()
    for name, meta in said.items():
        column = name.partition("/")[0]
        if wrong := _different(meta, wanted[name], column, dataset, skip):
            yield Fault("catalog", f"{CATALOG}/{name}", f"{CATALOG}/{name} has another {wrong} than such a column; {again}")


@cache
def _as_made(members: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """The zarr.json files of a new catalog, by path; not to be changed."""
    store: dict[str, Any] = {}
    create_columns(MemoryStore(store), members)
    return {name: json.loads(data.to_bytes()) for name, data in store.items() if name.endswith("zarr.json")}


def _json(raw: bytes) -> dict[str, Any]:
    """Raises ValueError unless the bytes are a JSON object as zarr writes it."""
    found = json.loads(raw)
    if not isinstance(found, dict) or json.dumps(found, indent=2).encode() != raw:
        raise ValueError("a byte of it changed")
    return found


def _different(meta: dict[str, Any], wanted: dict[str, Any], column: str, dataset: Dataset, skip: Sequence[str]) -> str:
    """The first field that is not as it should be; a vocabulary may hold any words, and there may be more rows than count."""
    meta, wanted = dict(meta), dict(wanted)
    for field in skip:
        meta.pop(field, None), wanted.pop(field, None)
    if meta.get("node_type") == "array" and isinstance(shape := meta.get("shape"), list) and isinstance(shape[0], int):
        least = 0 if column in LISTS else len(dataset)
        widths = [wanted["shape"][1:]]
        if column == "sha256":  # an earlier version kept no digest of the json member
            widths.append([len([m for m in dataset.meta.members if m != "json"]), 32])
            if shape[1:] == widths[1] != widths[0]:
                meta.pop("chunk_grid", None), wanted.pop("chunk_grid", None), meta.pop("codecs", None), wanted.pop("codecs", None)
        if shape[0] >= least and shape[1:] in widths:
            meta.pop("shape"), wanted.pop("shape")
    if column in CODED and isinstance(attributes := meta.get("attributes"), dict) and "attributes" in wanted:
        words = attributes.get("vocabulary")
        if list(attributes) == ["vocabulary"] and isinstance(words, list) and all(isinstance(w, str) for w in words):
            meta.pop("attributes"), wanted.pop("attributes")
    if column == "zarr.json" and isinstance(attributes := meta.get("attributes"), dict):
        later = attributes.get("later", [])
        if isinstance(later, list) and set(later) <= set(LATER):
            meta["attributes"] = {**attributes, "later": wanted["attributes"]["later"]}
    return next((field for field in {**wanted, **meta} if meta.get(field) != wanted.get(field)), "")


def added_faults(dataset: Dataset, files: Any, path: str) -> Iterator[Fault]:
    """The columns added later: read whole, and compared with the digest that was kept when they were written."""
    # zarr passes over an array whose zarr.json it cannot read: what lies there is asked of the disk
    try:
        there = sorted(f.rstrip("/").rpartition("/")[2] for f in files.ls(f"{path}/{CATALOG}", detail=False))
    except FileNotFoundError:  # said already
        return
    added = [n for n in there if n not in (*BUILT_IN, "zarr.json") and not n.startswith(".")]
    for name in added:
        where = f"{CATALOG}/{name}"
        try:
            wrong = _added(dataset, name, _json(files.cat_file(f"{path}/{where}/zarr.json")))
        except Exception as e:  # whatever zarr or a codec makes of a damaged file
            wrong = f"cannot be read ({type(e).__name__}: {e})"
        if wrong:
            yield Fault("catalog", where, f"column {name} {' '.join(wrong.split())}; {_MEND_ADDED}")


def _added(dataset: Dataset, name: str, meta: dict[str, Any]) -> str:
    attributes, shape = meta["attributes"], tuple(meta["shape"])
    kept = attributes.pop(DIGEST, None)
    if shape[0] != len(dataset):
        return f"covers {shape[0]} of {len(dataset)} clips"
    store: dict[str, Any] = {}
    create_array(zarr.create_group(MemoryStore(store), zarr_format=3), name, shape, meta["data_type"], attributes)
    fresh = json.loads(store[f"{name}/zarr.json"].to_bytes())
    earlier = kept is None and any(meta[field] != fresh[field] for field in _LAYOUT)
    for field in _LAYOUT if earlier else ():
        meta.pop(field), fresh.pop(field)
    half = len(DIGEST) // 2
    misnamed = any(k[:half] == DIGEST[:half] or k[half:] == DIGEST[half:] for k in attributes)
    if meta != fresh or misnamed:
        return "has a zarr.json that is not that of such a column"
    digest = column_digest(shape, meta["data_type"], attributes)
    for rows in row_blocks(shape, meta["data_type"]):
        digest.update(dataset.catalog.column(name, rows))
    return "has other numbers than were written" if kept not in (None, digest.hexdigest()) else ""
