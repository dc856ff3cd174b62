"""From staged clips to shards: the ledger, the staging folder and the data set kept in step, whenever the power goes."""

from __future__ import annotations

import logging
import tarfile
from dataclasses import replace
from itertools import groupby
from pathlib import Path

from cmacc.ingest import Ledger, Part, read_staged, staged_path
from cmacc.ingest.staging import clear_leftovers
from cmacc.shards.dataset import Dataset
from cmacc.shards.writer import DatasetWriter

log = logging.getLogger(__name__)


class Packer:
    """Puts the staged clips of one part into the data set at `home`, in the order of the manifests.

    A clip is safe at every moment: its staged tar goes only after its shard is committed and the ledger says so.
    where: what precedes the shards' names in the ledger, `parts/03/` for a part's own data set.
    """

    def __init__(self, ledger: Ledger, home: Path, part: Part = Part(), where: str = "") -> None:  # noqa: B008
        self.ledger, self.home, self.part, self.where = ledger, home, part, where
        self.staging = home / "ingest" / "staging"

    def settle(self, writer: DatasetWriter) -> None:
        """Mend what a killed run left: the data set decides what is done.

        Clips in a shard that the ledger does not know of are marked; clips it believes done which are in no shard and not
        staged either are to be done again. Shards on which both agree are not looked into.
        """
        dataset = Dataset.open(self.home)
        there = {self.where + shard.name: shard.clips for shard in dataset.meta.shards}
        known = {name: n for name, n in self.ledger.shards().items() if name.rpartition("/")[0] == self.where.rstrip("/")}
        lost: set[str] = set()
        for name in sorted(known.keys() | there.keys()):
            if known.get(name) != there.get(name):
                keys = set(dataset.keys_of_shard(name.removeprefix(self.where))) if name in there else set()
                lost |= set(self.ledger.keys_of_shard(name)) - keys
                self.ledger.mark_done(keys, name)
        lost |= {row["key"] for row in self.ledger.staged(self.part) if not staged_path(self.staging, row["source"]).exists()}
        if lost:
            log.warning("%d clips are no longer in %s; doing them again", len(lost), self.home)
            self.ledger.reopen(lost)
        clear_leftovers(self.staging, writer.keys)

    def pack(self, writer: DatasetWriter) -> None:
        """Add what is staged and not yet in the writer's hands."""
        for source, group in groupby(self.ledger.staged(self.part), key=lambda row: row["source"]):
            wanted = {row["key"]: row["duplicate_of"] for row in group if row["key"] not in writer.keys}
            if not wanted:
                continue
            try:
                for clip in read_staged(staged_path(self.staging, source)):
                    if clip.key in wanted:
                        facts = replace(clip.facts, duplicate_of=wanted.pop(clip.key))
                        writer.add(replace(clip, facts=facts))
            except (tarfile.TarError, FileNotFoundError, ValueError) as error:
                log.warning("the staged clips of %s cannot be read (%s); they will be made again by the next run", source, error)
                staged_path(self.staging, source).unlink(missing_ok=True)
            if wanted:
                self.ledger.reopen(wanted)

    def committed(self, shard: str, keys: list[str]) -> None:
        """`keys` lie in `shard` for good: say so, and drop staged tars of which nothing is needed any more."""
        self.ledger.mark_done(keys, self.where + shard)
        self.drop({key.rsplit("_", 2)[0] for key in keys})

    def drop(self, sources: set[str]) -> None:
        """Remove the staged tars of these source videos, if no clip of theirs waits for its shard."""
        for source in sources - {row["source"] for row in self.ledger.staged(self.part)}:
            staged_path(self.staging, source).unlink(missing_ok=True)

    def sweep(self) -> None:
        """The same for all of them: nothing is at work any more."""
        self.drop({path.stem for path in self.staging.glob("*.tar")})
