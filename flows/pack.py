"""From staged clips to shards: the ledger, the staging folder and the data set kept in step, whenever the power goes."""

from __future__ import annotations

import logging
import tarfile
from collections import defaultdict
from itertools import groupby
from pathlib import Path

from cmacc.ingest import Ledger, read_staged, staged_path
from cmacc.shards.dataset import Dataset
from cmacc.shards.writer import DatasetWriter

log = logging.getLogger(__name__)


class Packer:
    """Puts staged clips into the data set at `home`, in the order of the manifests.

    A clip is safe at every moment: its staged tar goes only after its shard is committed and the ledger says so.
    """

    def __init__(self, ledger: Ledger, home: Path) -> None:
        self.ledger, self.home = ledger, home

    @property
    def staging(self) -> Path:
        return self.home / "ingest" / "staging"

    def settle(self, there: set[str]) -> None:
        """Mend what a killed run left: the data set's keys, `there`, decide what is done.

        Clips in a shard that the ledger does not know of are marked; clips it believes done which are in no shard and not
        staged either are to be done again.
        """
        dataset = Dataset.open(self.home)
        shard_of = dict(zip(dataset.keys.tolist(), dataset.shard_of_row.tolist(), strict=True))
        unmarked: dict[str, list[str]] = defaultdict(list)
        lost: list[str] = []
        for row in self.ledger.rows():
            key = str(row["key"])
            if key in there and not row["shard"]:
                unmarked[dataset.meta.shards[shard_of[key]].name].append(key)
            elif row["state"] == "done" and key not in there and (
                row["shard"] or not staged_path(self.staging, str(row["source"])).exists()
            ):  # fmt: skip
                lost.append(key)
        for shard, keys in unmarked.items():
            self.committed(shard, keys)
        if lost:
            log.warning("%d clips are no longer in %s; doing them again", len(lost), self.home)
            self.ledger.reopen(lost)

    def pack(self, writer: DatasetWriter) -> None:
        """Add what is staged and not yet in the writer's hands."""
        for source, group in groupby(self.ledger.staged(), key=lambda pair: pair[1]):
            wanted = {key for key, _ in group} - writer.keys
            if not wanted:
                continue
            try:
                for clip in read_staged(staged_path(self.staging, source)):
                    if clip.key in wanted:
                        wanted.discard(clip.key)
                        writer.add(clip)
            except (tarfile.TarError, FileNotFoundError) as error:
                log.warning("the staged clips of %s cannot be read (%s); they will be made again by the next run", source, error)
                staged_path(self.staging, source).unlink(missing_ok=True)
            if wanted:
                self.ledger.reopen(wanted)

    def committed(self, shard: str, keys: list[str]) -> None:
        """`keys` lie in `shard` for good: say so, and drop staged tars of which nothing is needed any more."""
        self.ledger.mark_done(keys, shard)
        needed = {source for _, source in self.ledger.staged()}
        for source in {key.rsplit("_", 2)[0] for key in keys} - needed:
            staged_path(self.staging, source).unlink(missing_ok=True)
