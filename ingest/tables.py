"""Rows of a clip list, whatever table it is: CSV, TSV, JSONL, Parquet, the published lists without a header, a folder."""

from __future__ import annotations

import csv
import io
import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import duckdb

Format = Literal["auto", "audioset", "vggsound", "acav100m", "table", "jsonl", "parquet", "folder", "media"]
Row = Mapping[str, Any]
Rows = Iterator[tuple[int, Row | str]]
"""(line number, the row by our field names, or else what is wrong with the line)"""

# fmt: off
MEDIA = frozenset((
    "3g2", "3gp", "asf", "avi", "f4v", "flv", "ivf", "m2ts", "m4v", "mkv", "mov", "mp4", "mpeg", "mpg", "mts", "mxf", "ogv", "rm",
    "rmvb", "ts", "vob", "webm", "wmv",
))
# fmt: on
FIELDS = {
    "url": ("url", "link", "address"),
    "path": ("path", "file", "filename", "file_name", "video_path"),
    "id": ("youtube_id", "ytid", "video_id", "videoid", "yt_id", "id"),
    "start": ("start", "start_s", "start_seconds", "start_time", "time_start", "begin"),
    "end": ("end", "end_s", "end_seconds", "end_time", "time_end"),
    "duration": ("duration", "duration_s", "length"),
    "labels": ("labels", "positive_labels"),
    "label": ("label", "class", "category", "category_1"),
    "split": ("split", "subset"),
}
_POSITIONS = {
    "audioset": ("id", "start", "end", "labels"),
    "vggsound": ("id", "start", "label", "split"),
    "acav100m": ("id", "start", "end"),
}
_VGGSOUND_S = 10.0


class Tables:
    """Reads rows under our field names. label_column: the column that holds the label, where its name does not say so."""

    def __init__(self, label_column: str = "") -> None:
        self.fields = FIELDS | ({"labels": (), "label": (label_column.lower(),)} if label_column else {})

    def rows(self, name: str, data: bytes, format: Format) -> Rows:
        """Rows of the list `name` that holds `data`. Raises ValueError with one sentence when it is no list we know."""
        if format == "parquet" or (format == "auto" and data[:4] == b"PAR1"):
            return self._parquet(data)
        if b"\0" in data[:4096]:
            raise ValueError(
                f"manifest {name} is neither text nor Parquet; give a CSV, TSV, JSONL or Parquet list, or a media file"
            )
        text = data.decode("utf-8-sig", errors="replace")
        if format == "jsonl" or (format == "auto" and text.lstrip()[:1] == "{"):
            return self._jsonl(text)
        return self._table(name, text, format)

    def folder(self, folder: Path) -> Rows:
        """Media files in order of path; a `labels.csv` in the folder that names files gives their labels and splits."""
        notes: dict[str, Row] = {}
        table = folder / "labels.csv"
        if table.is_file():
            for _, row in self._table(str(table), table.read_text("utf-8-sig", errors="replace"), "auto"):
                if not isinstance(row, str) and "path" in row:
                    notes[str(row["path"])] = row
        files = sorted(f for f in folder.rglob("*") if f.suffix[1:].lower() in MEDIA and f.is_file())
        for number, file in enumerate(files, 1):
            relative = file.relative_to(folder).as_posix()
            yield number, {**notes.get(relative, notes.get(file.name, {})), "path": relative}

    def _jsonl(self, text: str) -> Rows:
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                yield number, f"not JSON: {error}"
                continue
            yield number, self._by_field(row) if isinstance(row, dict) else "not a JSON object"

    def _parquet(self, data: bytes) -> Rows:
        with tempfile.NamedTemporaryFile(suffix=".parquet") as copy, duckdb.connect() as database:
            copy.write(data)
            copy.flush()
            table = database.execute("select * from read_parquet(?)", [copy.name])
            names = [column[0] for column in table.description or ()]
            number = 0
            while (values := table.fetchone()) is not None:
                number += 1
                yield number, self._by_field(dict(zip(names, values, strict=True)))

    def _table(self, name: str, text: str, format: Format) -> Rows:
        """Rows of a table with a header, of a published list without one, or one address a line."""
        content = next((line for line in text.splitlines() if line.strip() and not line.startswith("#")), "")
        delimiter = max(",\t;", key=content.count)
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
        names: Sequence[str] | None = _POSITIONS.get(format)
        mids = _ontology(name)
        while True:
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield reader.line_num, f"not a row of a table: {error}"
                continue
            if not any(cell.strip() for cell in cells) or cells[0].startswith("#"):
                continue
            if names is None:
                names, header = self._columns(name, cells)
                if header:
                    continue
            row = self._by_field(dict(zip(names, cells, strict=False)))
            if names == _POSITIONS["vggsound"] and (start := number(row.get("start"))) is not None:
                row["end"] = start + _VGGSOUND_S
            if mids and "labels" in row:
                row["labels"] = [mids.get(mid.strip(), mid.strip()) for mid in str(row["labels"]).split(",")]
            yield reader.line_num, row

    def _columns(self, name: str, cells: Sequence[str]) -> tuple[Sequence[str], bool]:
        """(the columns' names, whether these cells are themselves the header), from the first row of a table."""
        plain = [cell.strip().lower() for cell in cells]
        if set(plain) & {alias for field in ("url", "path", "id") for alias in self.fields[field]}:
            return plain, True
        numbers = [number(cell) is not None for cell in cells[1:4]]
        if len(cells) == 1:
            return ("address",), False
        if numbers[:2] == [True, True]:
            return _POSITIONS["audioset" if len(cells) > 3 else "acav100m"], False
        if numbers[0] and len(cells) in (3, 4):
            return _POSITIONS["vggsound"], False
        raise ValueError(
            f"manifest {name} is not a list this version knows: its first row is {','.join(cells)[:80]!r}; name the columns in a "
            "header (youtube_id, url or path; start, end; label; split)"
        )

    def _by_field(self, row: Row) -> dict[str, Any]:
        """The row under our field names: what no field knows is left out, of several aliases the first that is filled wins."""
        lower = {str(name).strip().lower(): value for name, value in row.items() if filled(value)}
        found = {field: next((lower[a] for a in names if a in lower), None) for field, names in self.fields.items()}
        return {field: value for field, value in found.items() if value is not None}


def _ontology(name: str) -> dict[str, str]:
    """AudioSet's `class_labels_indices.csv` beside the manifest: label id to its name."""
    beside = Path(name).parent / "class_labels_indices.csv"
    if not beside.is_file():
        return {}
    with beside.open(newline="", encoding="utf-8-sig") as file:
        return {row["mid"]: row["display_name"] for row in csv.DictReader(file) if row.get("mid") and row.get("display_name")}


def filled(value: Any) -> bool:
    return value is not None and str(value).strip() != ""


def number(value: Any) -> float | None:
    """A finite number of sensible size, or None."""
    try:
        found = float(value)
    except (TypeError, ValueError):
        return None
    return found if math.isfinite(found) and abs(found) < 1e7 else None
