"""Rows of a clip list, whatever table it is: CSV, TSV, JSONL, Parquet, the published lists, addresses, a folder."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import duckdb

from cmacc.ingest.addresses import YOUTUBE_ID, shown
from cmacc.ingest.lines import LONGEST, TOO_LONG, lines, records

Format = Literal[
    "auto", "audioset", "vggsound", "kinetics", "acav100m", "howto100m", "table", "jsonl", "parquet", "folder", "media"
]
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
    "path": ("path", "file", "filename", "file_name", "filepath", "file_path", "video_path"),
    "id": ("youtube_id", "youtubeid", "ytid", "video_id", "videoid", "yt_id", "id"),
    "start": ("start", "start_s", "start_sec", "start_seconds", "start_time", "start_time_seconds", "time_start", "begin"),
    "end": ("end", "end_s", "end_sec", "end_seconds", "end_time", "end_time_seconds", "time_end"),
    "duration": ("duration", "duration_s", "length"),
    "labels": ("labels", "positive_labels"),
    "label": ("label", "class", "category", "category_1"),
    "split": ("split", "subset"),
    "captions": ("captions",),
}
_POSITIONS: dict[str, tuple[str, ...]] = {
    "audioset": ("id", "start", "end", "labels"),
    "vggsound": ("id", "start", "label", "split"),
    "kinetics": ("label", "id", "start", "end", "split"),
    "acav100m": ("id", "start", "end"),
    "howto100m": ("id", "category_1", "category_2"),
}
_VGGSOUND_S = 10.0
_SNIFFED = 200
_BATCH = 4096


@dataclass(frozen=True)
class Layout:
    """How the lines of a text are rows. columns: cells that may fill a field, the first filled one wins. header: its line."""

    kind: str
    delimiter: str = ","
    columns: tuple[tuple[str, tuple[int, ...]], ...] = ()
    header: int = 0


class Tables:
    """Reads rows under our field names. label_column: the column that holds the label, where its name does not say so."""

    def __init__(self, label_column: str = "") -> None:
        self.fields = FIELDS | ({"labels": (), "label": (plain_name(label_column),)} if label_column else {})
        self.own_label = bool(label_column)

    def rows(self, name: str, path: Path, format: Format, beside: Path | None) -> Rows:
        """Rows of the list at `path`, a stream. beside: the folder with the names of AudioSet's labels.

        Raises ValueError with one sentence, before the first row, when it is no list we know.
        """
        with path.open("rb") as file:
            parquet = file.read(4) == b"PAR1"
        if format == "parquet" or (format == "auto" and parquet):
            return self._parquet(path)
        layout = self._layout(name, path, format)
        if layout is None:
            return iter(())
        if layout.kind == "jsonl":
            return self._jsonl(path)
        if layout.kind == "addresses":
            return _addresses(path)
        return self._table(path, layout, _label_names(beside) if beside else {})

    def folder(self, folder: Path) -> Rows:
        """Media files in order of path; a `labels.csv` in the folder that names files gives their labels and splits."""
        notes: dict[str, Row] = {}
        table = folder / "labels.csv"
        if table.is_file():
            for _, row in self.rows(str(table), table, "table", None):
                if not isinstance(row, str) and "path" in row:
                    notes[str(row["path"])] = {field: value for field, value in row.items() if field not in ("url", "id")}
        for number, relative in enumerate(_media_files(folder, ""), 1):
            yield number, {**notes.get(relative, notes.get(relative.rpartition("/")[2], {})), "path": relative}

    def _jsonl(self, path: Path) -> Rows:
        for number, line in lines(path):
            if line is None:
                yield number, TOO_LONG
            elif line.strip():
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    yield number, f"not JSON: {str(error)[:200]}"
                else:
                    yield number, self._by_field(row) if isinstance(row, dict) else "not a JSON object"

    def _parquet(self, path: Path) -> Rows:
        # by a link, for DuckDB takes `*` and `[` in a name as patterns
        with tempfile.TemporaryDirectory() as folder, duckdb.connect(config={"threads": 1}) as database:
            link = Path(folder) / "list.parquet"
            link.symlink_to(path.resolve())
            known = {alias for names in self.fields.values() for alias in names}
            database.execute("select * from read_parquet(?) limit 0", [str(link)])
            names = [column[0] for column in database.description or () if plain_name(column[0]) in known]
            if not names:
                raise ValueError(f"manifest {path.name} has no column this version knows; {_WANTED}")
            columns = ", ".join('"' + name.replace('"', '""') + '"' for name in names)
            database.execute(f"select {columns} from read_parquet(?)", [str(link)])
            first = 1
            while batch := database.fetchmany(_BATCH):
                for number, values in enumerate(batch, first):
                    yield number, self._by_field(dict(zip(names, values, strict=True)))
                first += len(batch)

    def _table(self, path: Path, layout: Layout, label_names: Mapping[str, str]) -> Rows:
        """Rows of a table with a header, or of a published list without one."""
        labelled = layout.kind == "howto100m" and not self.own_label
        for number, cells in records(path, layout.delimiter, over_lines=layout.kind == "table"):
            if isinstance(cells, str):
                yield number, cells
                continue
            if number <= layout.header or not cells or cells[0].startswith("#") or not any(map(str.strip, cells)):
                if number < layout.header and cells and not cells[0].startswith("#") and any(map(str.strip, cells)):
                    yield number, "stands before the header"
                continue
            row: dict[str, Any] = {}
            for field, places in layout.columns:
                for place in places:
                    if place < len(cells) and (cell := cells[place].strip()):
                        row[field] = cell
                        break
            if layout.kind == "audioset" and not layout.header and len(cells) > 4:
                row["labels"] = ",".join(cells[3:])  # without its quotes
            elif layout.kind == "vggsound" and "end" not in row and (start := number_of(row.get("start"))) is not None:
                row["end"] = start + _VGGSOUND_S
            elif labelled:
                row["labels"] = [row.pop(name) for name in ("category_1", "category_2") if name in row]
            if label_names and "labels" in row:
                row["labels"] = [label_names.get(mid.strip(), mid.strip()) for mid in str(row["labels"]).split(",")]
            yield number, row

    def _layout(self, name: str, path: Path, format: Format) -> Layout | None:
        """How to read the text at `path`, by the first line that tells; None if no line holds anything. Raises ValueError."""
        if format == "jsonl":
            return Layout("jsonl")
        first, size, seen, binary = "", 0, 0, False
        for number, line in lines(path):
            size += len(line or " " * LONGEST)
            content = (line or "?").strip()
            binary = binary or "\0" in content
            if not content or content.startswith("#"):
                continue
            first = first or content
            seen += 1
            if seen > _SNIFFED or size > 2 * LONGEST:
                break
            plain = content.replace("\t", "").isprintable() and "\ufffd" not in content
            if plain and (found := self._recognised(content, number, format)):
                return found
        if not first:
            return None
        if binary:
            raise ValueError(
                f"manifest {name} is neither text nor Parquet; give a CSV, TSV, JSONL or Parquet list, or a media file"
            )
        if format in _POSITIONS:
            return self._published(format, first)
        raise ValueError(f"manifest {name} is not a list this version knows: its first row is {shown(first)}; {_WANTED}")

    def _recognised(self, line: str, number: int, format: Format) -> Layout | None:
        """The layout that one line tells: as a header, as a row of a published list, as an address."""
        if line.startswith("{") and format == "auto":
            return Layout("jsonl")
        delimiter = max(",\t;", key=line.count)
        try:
            cells = next(csv.reader([line], delimiter=delimiter, skipinitialspace=True))
        except csv.Error:
            return None
        while cells and not cells[-1].strip():
            cells.pop()
        if not cells:
            return None
        names = [plain_name(cell) for cell in cells]
        fields = ("url", "path", "id")
        if set(names) & {alias for field in fields for alias in self.fields[field]} and not any(map(_is_number, cells)):
            return self._headed(names, delimiter, number, format)
        if format in _POSITIONS:
            return self._published(format, line) if len(cells) > 1 else None
        if (kind := _published_kind(cells)) is not None:
            return self._published(kind, line)
        if "://" in cells[0] or len(cells) == 1:
            address = "://" in line or YOUTUBE_ID.fullmatch(line) or "/" in line or _suffix(line) in MEDIA
            if address and not any(map(_is_number, cells[1:])):
                return Layout("addresses")
        return None

    def _headed(self, names: Sequence[str], delimiter: str, number: int, format: Format) -> Layout:
        """A table with these column names. Of columns of one name the first counts."""
        places = {name: i for i, name in reversed(list(enumerate(names)))}
        kind: str = format if format in _POSITIONS else "table"
        if format == "auto" and {"category_1", "video_id"} <= set(names) and {"rank", "task_id"} & set(names):
            kind = "howto100m"
        elif format == "auto" and {"youtube_id", "time_start", "time_end"} <= set(names):
            kind = "kinetics"
        fields = dict(self.fields)
        if kind == "howto100m" and not self.own_label:
            fields |= {"label": (), "category_1": ("category_1",), "category_2": ("category_2",)}
        found = ((field, tuple(places[a] for a in aliases if a in places)) for field, aliases in fields.items())
        return Layout(kind, delimiter, tuple((field, at) for field, at in found if at), number)

    def _published(self, kind: str, line: str) -> Layout:
        delimiter = max(",\t;", key=line.count)
        return Layout(kind, delimiter, tuple((field, (i,)) for i, field in enumerate(_POSITIONS[kind])))

    def _by_field(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The row under our field names: what no field knows is left out, of several aliases the first that is filled wins."""
        plain = {plain_name(name): value for name, value in row.items() if filled(value)}
        found: dict[str, Any] = {}
        for field, aliases in self.fields.items():
            for alias in aliases:
                if alias in plain:
                    found[field] = plain[alias]
                    break
        return found


_WANTED = "name the columns in a header (youtube_id, url or path; start, end; label; split)"


def _published_kind(cells: Sequence[str]) -> str | None:
    """Which published list has rows like this one and no header."""
    numbers = [_is_number(cell) for cell in cells]
    if len(cells) in (4, 5) and YOUTUBE_ID.fullmatch(cells[1].strip()) and numbers[2:4] == [True, True]:
        return "kinetics"
    if not YOUTUBE_ID.fullmatch(cells[0].strip()):
        return None
    if numbers[1:3] == [True, True]:
        return "audioset" if len(cells) > 3 else "acav100m"
    return "vggsound" if len(cells) in (3, 4) and numbers[1] else None


def _addresses(path: Path) -> Rows:
    for number, line in lines(path):
        if line is None:
            yield number, TOO_LONG
        elif (address := line.strip().strip("\"'").strip()) and not address.startswith("#"):
            yield number, {"url": address}


def _media_files(folder: Path, below: str) -> Iterator[str]:
    """Paths of the media files in and under a folder, relative to it, in order; links to folders are not followed."""
    with os.scandir(folder / below) as entries:
        found = sorted((e.name, e.is_dir(follow_symlinks=False)) for e in entries if e.is_dir() or _suffix(e.name) in MEDIA)
    for name, is_folder in found:
        if is_folder:
            yield from _media_files(folder, f"{below}{name}/")
        elif (folder / below / name).is_file():
            yield f"{below}{name}"


def _label_names(folder: Path) -> dict[str, str]:
    """AudioSet's names of label ids, from `class_labels_indices.csv` or `ontology.json` beside the manifest."""
    indices, ontology = folder / "class_labels_indices.csv", folder / "ontology.json"
    if indices.is_file():
        with indices.open(newline="", encoding="utf-8-sig", errors="replace") as file:
            return {row["mid"]: row["display_name"] for row in csv.DictReader(file) if row.get("mid") and row.get("display_name")}
    if ontology.is_file():
        try:
            return {str(c["id"]): str(c["name"]) for c in json.loads(ontology.read_text("utf-8-sig"))}
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{ontology} is not AudioSet's ontology; mend it or take it away") from error
    return {}


@lru_cache(maxsize=4096)
def plain_name(column: str) -> str:
    """A column's name in small letters, `_` for whatever else stands between them."""
    return re.sub(r"[^a-z0-9]+", "_", str(column).lower()).strip("_")


def filled(value: Any) -> bool:
    if value is None or value != value:  # NaN is how data frames write nothing
        return False
    return bool(value.strip()) if isinstance(value, str) else True


def number_of(value: Any) -> float | None:
    """A finite number of sensible size, or None."""
    try:
        found = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return found if math.isfinite(found) and abs(found) < 1e7 else None


def _is_number(text: str) -> bool:
    return number_of(text) is not None


def _suffix(name: str) -> str:
    return name.rpartition(".")[2].lower()
