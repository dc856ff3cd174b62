"""Clips of a data set as plain files, for those who want to look at a few."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from cmacc.shards.clip import check_key
from cmacc.shards.dataset import Dataset
from cmacc.shards.errors import DatasetError
from cmacc.shards.publish import no_room_as, publish

_EXTENSION = re.compile(r"[A-Za-z0-9]{1,16}(\.[A-Za-z0-9]{1,16})?")


def extract(dataset: Dataset, rows: Iterable[int], folder: Path, members: Sequence[str] | None = None) -> list[Path]:
    """Write `KEY.EXTENSION` for some members of some clips (default: all of them) into `folder`; the files written.

    What is read is compared with its sha256, a file appears whole, and one that is there is replaced. Raises DatasetError, also
    for a key or an extension that is no plain name: nothing is written outside `folder`. Raises OSError, too.
    """
    for member in members or dataset.meta.members:
        if not _EXTENSION.fullmatch(member):
            raise DatasetError(f"{member!r} is no extension for a file; name the members of {dataset.url} that are to be written")
    written = []
    with no_room_as(DatasetError, f"no room on the disk of {folder}; free some and run again"):
        folder.mkdir(parents=True, exist_ok=True)
        for row in rows:
            if not 0 <= row < len(dataset):
                raise DatasetError(f"row {row} is not in {dataset.url}, which has {len(dataset)} clips")
            found = dataset.read(row, members, check=True)
            try:
                key = check_key(str(dataset.catalog.texts("key", slice(row, row + 1))[0]))
            except ValueError as e:
                raise DatasetError(f"row {row} of {dataset.url} cannot be a file ({e}); nothing was written for it") from e
            for member, data in found.items():
                publish(folder / f"{key}.{member}", data)
                written.append(folder / f"{key}.{member}")
    return written
