"""What commands find out, as people read it: sizes with a unit, lists as words, and only lines that say something."""

from __future__ import annotations

from typing import Any

from pydantic import ByteSize

_MOST_LABELS = 5


def size(count: int) -> str:
    """`78.5 MiB`."""
    return ByteSize(count).human_readable(separator=" ")


def counted(count: int, thing: str) -> str:
    """`1 shard`, `1,240 clips`."""
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def resharded(done: dict[str, Any], verb: str = "copied") -> dict[str, str]:
    """The lines of a `Resharded` as a dict. verb: what was done to the clips."""
    undecoded = done["selected"] - done["there"] - done["written"]
    left_out = (
        (done["duplicates"], "with the key of an earlier one"),
        (done["near"], "nearly the same as an earlier one"),
        (undecoded, "that cannot be decoded"),
    )
    there, written = done["there"], done["written"]
    clips = f"{written:,} {verb}" if written or not there else f"{there:,}, all there from before"
    if there and written:
        clips = f"{there + written:,}: {written:,} {verb} now, {there:,} there from before"
    return _said(
        {
            "clips": clips,
            "left out": _listed(*(f"{n:,} {why}" for n, why in left_out if n)),
            "size": f"{size(done['bytes'])} in {counted(done['shards'], 'shard')}",
            "fingerprint": done["fingerprint"],
        }
    )


def described(facts: dict[str, Any]) -> dict[str, str]:
    """The lines of `cmacc.shards.describe.describe` but for its quantiles."""
    labels, profile = facts["labels"], facts["profile"] or {}
    most = f", most frequent {_listed(*list(labels)[:_MOST_LABELS])}" if len(labels) > 1 else ""
    added = (
        f"{name} ({' x '.join(map(str, shape[1:]))} numbers a clip)" if shape[1:] else name
        for name, shape in facts["added_columns"].items()
    )
    return _said(
        {
            "clips": f"{facts['clips']:,}, {facts['hours']:.3g} hours",
            "size": f"{size(facts['bytes'])} in {counted(facts['shards'], 'shard')}",
            "source videos": f"{facts['sources']:,}",
            "splits": _listed(*(f"{name or '(none)'} {n:,}" for name, n in facts["splits"].items())),
            "labels": f"{len(labels):,}{most}" if labels else "",
            "near duplicates": f"{facts['duplicates']:,}" if facts["duplicates"] else "",
            "added columns": _listed(*added),
            "members": _listed(*facts["members"]),
            "profile": _listed(*(str(value) if name == "name" else f"{name} {value}" for name, value in profile.items())),
            "made from": _origin(facts["provenance"]),
            "fingerprint": facts["fingerprint"],
        }
    )


def _origin(provenance: dict[str, Any]) -> str:
    made = provenance.get("reshard") or {}
    asked = {k: v for k, v in made.items() if k not in ("sources", "members", "shard_bytes", "profile") and v is not None}
    sources = [source["url"] for source in made.get("sources", ())] or provenance.get("ingest", {}).get("manifests", ())
    return _listed(*map(str, sources), *(f"{name} {value}" for name, value in asked.items()))


def _listed(*words: str) -> str:
    return ", ".join(word for word in words if word)


def _said(lines: dict[str, str]) -> dict[str, str]:
    return {name: line for name, line in lines.items() if line}
