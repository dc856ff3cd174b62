"""One part of an ingest, or all of it, into one data set."""

from __future__ import annotations

from pathlib import Path

from cmacc.flows.pack import Packer
from cmacc.flows.plan import Plan
from cmacc.flows.progress import Tell
from cmacc.flows.work_through import work_through
from cmacc.ingest import IngestFailure, Ledger, Part
from cmacc.shards.writer import DatasetWriter

SHARD_CLIPS = 500
"""Small clips make shards smaller than asked: what a shard holds in memory until it is closed would grow with them."""


def do_part(
    home: Path,
    folder: Path,
    plan: Plan,
    ledger: Ledger,
    tell: Tell,
    part: Part = Part(),  # noqa: B008
) -> IngestFailure | None:
    """Do what the ledger has to do of `part`, into the data set `folder`; a part's own lies within that of the whole, `home`.

    Returns what stopped it, if something did.
    """
    where = "" if folder == home else f"{folder.relative_to(home).as_posix()}/"
    packer = Packer(ledger, folder, part, where)
    with DatasetWriter(
        folder,
        plan.config.profile,
        shard_bytes=plan.shard_mb << 20,
        shard_clips=SHARD_CLIPS,
        provenance={"ingest": plan.made_by},
        on_commit=packer.committed,
    ) as writer:
        packer.settle(writer)
        packer.pack(writer)
        stop = work_through(ledger, packer, writer, plan.config, plan.hands, tell)
    packer.sweep()
    return stop
