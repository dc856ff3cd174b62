"""What is printed: what was killed when, and what was lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from striking import Struck

_HEADS = ("killed (kill -9)", "host", "address", "when", "processes", "away", "lost")
_UNITS = {"ingest": "clips", "pretrain": "steps"}


def kills(struck: Sequence[Struck], addresses: Mapping[str, str], whole: Mapping[str, int], found: Sequence[str]) -> str:
    """A row a kill. whole: clips or steps of a phase, by its name; found: differences, which nobody can lay to one of them."""
    rows = [_HEADS]
    for each in struck:
        kill = each.kill
        when = f"{kill.phase}, {each.progress} of {whole[kill.phase]} {_UNITS[kill.phase]} (drawn: {kill.at}), {each.at_s:.0f} s"
        rows.append(
            (
                kill.what,
                kill.host,
                addresses[kill.host],
                when,
                str(each.processes),
                f"{each.away_s:.0f} s",
                "see below" if found else "nothing",
            )
        )
    return columns(rows)


def costs(plays: Mapping[str, Mapping[str, int]]) -> str:
    """What each play took, side by side. plays: its numbers, by its name."""
    names = dict.fromkeys(name for numbers in plays.values() for name in numbers)
    rows = [("", *plays), *((name, *(str(numbers.get(name, "")) for numbers in plays.values())) for name in names)]
    return columns(rows)


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows of texts, set in columns; a line under the first row."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])
