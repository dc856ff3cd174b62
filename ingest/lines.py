"""Lines of a text and rows of a table, one at a time: a broken one costs itself, whatever bytes it is made of."""

from __future__ import annotations

import codecs
import csv
from collections import deque
from collections.abc import Iterator
from pathlib import Path

LONGEST = 1 << 20
"""Characters of a line; a longer one is passed over without being held in memory."""
TOO_LONG = f"line is longer than {LONGEST:,} characters"
_MOST_LINES = 50


def lines(path: Path) -> Iterator[tuple[int, str | None]]:
    """(number from 1, text with its end) of each line of a UTF-8 or UTF-16 file; None stands for a line that is too long."""
    with path.open("rb") as file:
        wide = file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    with path.open(encoding="utf-16" if wide else "utf-8-sig", errors="replace") as text:
        number = 0
        while line := text.readline(LONGEST):
            number += 1
            if len(line) < LONGEST or line[-1] == "\n":
                yield number, line
                continue
            while (more := text.readline(LONGEST)) and more[-1] != "\n":
                pass
            yield number, None


def records(path: Path, delimiter: str, over_lines: bool) -> Iterator[tuple[int, list[str] | str]]:
    """(number of its first line, its cells or else what is wrong) of each row of a table.

    over_lines: a quoted cell may go over several lines. A quote that is not closed as it should be costs its own line alone.
    """
    feed = _Feed(lines(path))
    plain = csv.reader(feed, delimiter=delimiter, skipinitialspace=True)
    strict = csv.reader(feed, delimiter=delimiter, skipinitialspace=True, strict=True)
    while True:
        feed.taken.clear()
        try:
            try:
                cells = next(plain)
            except _UnclosedError:
                if not over_lines:
                    raise
                feed.put_back(0)
                feed.most = _MOST_LINES
                # strict, for a quote left open here is "closed" where a later row opens one of its own
                cells = next(strict)
            number = feed.taken[0][0]
        except StopIteration:
            return
        except _TooLongError:
            yield feed.taken[0][0], TOO_LONG
        except (_UnclosedError, csv.Error) as error:
            unclosed = isinstance(error, _UnclosedError) or len(feed.taken) > 1
            feed.put_back(1)
            yield feed.taken[0][0], "a quote is opened and not closed" if unclosed else f"not a row of a table: {error}"
        else:
            yield number, cells
        finally:
            feed.most = 1


class _UnclosedError(Exception):
    pass


class _TooLongError(Exception):
    pass


class _Feed(Iterator[str]):
    """Lines for a csv reader: at most `most` for a row, and those that a row took can be put back."""

    def __init__(self, source: Iterator[tuple[int, str | None]]) -> None:
        self.source = source
        self.most = 1
        self.taken: list[tuple[int, str | None]] = []
        self.back: deque[tuple[int, str | None]] = deque()

    def __next__(self) -> str:
        if len(self.taken) == self.most:
            raise _UnclosedError
        entry = self.back.popleft() if self.back else next(self.source, None)
        if entry is None:
            if self.taken:
                raise _UnclosedError
            raise StopIteration
        self.taken.append(entry)
        if entry[1] is None:
            raise _TooLongError if len(self.taken) == 1 else _UnclosedError
        return entry[1]

    def put_back(self, keep: int) -> None:
        """All the lines of this row but the first `keep`."""
        self.back.extendleft(reversed(self.taken[keep:]))
        del self.taken[keep:]
