"""What lint finds: every fault is one sentence, what, where and how to mend."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

_FEW = 10


@dataclass(frozen=True)
class Fault:
    """code: `dataset`, `missing`, `size`, `checksum`, `tar`, `index`, `members`, `key`, `duplicate`, `split`, `count`, `catalog`,
    `stray`, `decode` or `duration`. where: a file, or KEY.MEMBER. sentence: for people, with the mend."""

    code: str
    where: str
    sentence: str


def few(faults: Iterable[Fault], where: str) -> Iterator[Fault]:
    """The first ten faults of each code, and how many more `where` has: a million alike would tell nobody more."""
    counts: Counter[str] = Counter()
    for fault in faults:
        counts[fault.code] += 1
        if counts[fault.code] <= _FEW:
            yield fault
    for code, count in counts.items():
        if count > _FEW:
            yield Fault(
                code, where, f"{where} has {count - _FEW} more faults of the kind {code!r}; mend the first, and lint again"
            )
