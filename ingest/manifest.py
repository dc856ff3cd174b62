"""Clip lists as people publish them, row by row: a request for a clip, or the reason why a row asks for none."""

from __future__ import annotations

import os
import re
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import get_args
from urllib.parse import parse_qs, urlsplit

import duckdb

from cmacc.ingest.tables import MEDIA, Format, Row, Rows, Tables, filled, number
from cmacc.shards.clip import clip_key, source_id

YOUTUBE = "https://www.youtube.com/watch?v={id}"


@dataclass(frozen=True, slots=True)
class ClipRequest:
    """One row of a manifest: which seconds of which source video. end_s None: to the end of the source video."""

    row: int
    manifest: str
    source: str
    address: str
    start_s: float = 0.0
    end_s: float | None = None
    labels: tuple[str, ...] = ()
    split: str = ""

    @property
    def key(self) -> str:
        return clip_key(self.source, self.start_s, self.end_s)


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that asks for no clip; `row` is its line number, `reason` one sentence."""

    manifest: str
    row: int
    reason: str


@dataclass(frozen=True)
class Manifest:
    """Every row of a clip list: a request or a bad row, never both, in the order of the list."""

    name: str
    requests: tuple[ClipRequest, ...]
    bad_rows: tuple[BadRow, ...]


def read_manifest(
    source: str | Path, *, format: Format = "auto", url_template: str | None = None, split: str = "", label_column: str = ""
) -> Manifest:
    """Read a clip list: a file, a folder of media files, one media file, or the http(s) address of a list or a video.

    Lists: AudioSet, VGGSound, Kinetics, ACAV100M as published; CSV, TSV, JSONL, Parquet with named columns; an address a line.
    format: how to read it; `auto` goes by content. url_template: where a YouTube id is fetched from, with `{id}` in it.
    split: for rows that name none. label_column: the column that holds the label, where its name does not say so.
    Bad rows are listed, never fatal. Raises ValueError, one sentence, for a list that cannot be read or holds no row.
    """
    if format not in get_args(Format):
        raise ValueError(f"manifest format {format!r} is not known; use one of {', '.join(get_args(Format))}")
    template = url_template or YOUTUBE
    if "{id}" not in template:
        raise ValueError(f"url_template {template!r} has no {{id}}; write where the video id goes, e.g. {YOUTUBE}")
    remote = str(source).startswith(("http://", "https://"))
    name = str(source) if remote else _plain_path(Path.cwd() / source)
    tables = Tables(label_column)
    try:
        if format == "folder" or (format == "auto" and not remote and Path(name).is_dir()):
            rows, folder = tables.folder(Path(name)), Path(name)
        elif format == "media" or (format == "auto" and _is_media(name, remote)):
            rows, folder = iter([(1, {"url" if remote else "path": name})]), Path(name).parent
        else:
            rows, folder = tables.rows(name, _load(name, remote), format), Path(name).parent
        manifest = _collect(name, rows, None if remote else folder, template, split)
    except (OSError, duckdb.Error) as error:
        raise ValueError(f"manifest {name} cannot be read: {error}") from error
    if not manifest.requests and not manifest.bad_rows:
        raise ValueError(f"manifest {name} is empty: it names no clip")
    return manifest


def _is_media(name: str, remote: bool) -> bool:
    path = urlsplit(name).path if remote else name
    return path.rpartition(".")[2].lower() in MEDIA or (remote and _youtube_id(name) is not None)


def _load(name: str, remote: bool) -> bytes:
    if not remote:
        return Path(name).read_bytes()
    with urllib.request.urlopen(name, timeout=60) as response:
        data: bytes = response.read()
    return data


def _plain_path(path: Path) -> str:
    """Absolute, without `.` and `..`; a link keeps its own name."""
    return os.path.normpath(path)


def _collect(name: str, rows: Rows, folder: Path | None, template: str, split: str) -> Manifest:
    requests: dict[str, ClipRequest] = {}
    bad: list[BadRow] = []
    for line, row in rows:
        try:
            if isinstance(row, str):
                raise ValueError(row)
            request = _request(name, line, row, folder, template, split)
            first = requests.setdefault(request.key, request)
            if first is not request:
                raise ValueError(f"same clip as line {first.row}")
        except ValueError as error:
            bad.append(BadRow(name, line, str(error)))
    return Manifest(name, tuple(requests.values()), tuple(bad))


def _request(name: str, line: int, row: Row, folder: Path | None, template: str, split: str) -> ClipRequest:
    """Raises ValueError with the reason when the row asks for no clip."""
    source, address = _source(row, folder, template)
    start = _seconds(row, "start") or 0.0
    end = _seconds(row, "end")
    if end is None and (duration := _seconds(row, "duration")) is not None:
        end = start + duration
    if start < 0:
        raise ValueError(f"start is negative ({start:g} s)")
    if end is not None and round(end * 1000) <= round(start * 1000):
        raise ValueError(f"end ({end:g} s) is not after start ({start:g} s)")
    return ClipRequest(line, name, source, address, start, end, _labels(row), str(row.get("split") or split).strip())


def _source(row: Row, folder: Path | None, template: str) -> tuple[str, str]:
    """(source id, address), from a URL, a path or a YouTube id, in that order; a bare address may be any of them."""
    url = str(row.get("url") or "").strip()
    if url and "://" not in url:
        row = {"id" if re.fullmatch(r"[\w-]{11}", url) else "path": url}
    elif url:
        if (youtube := _youtube_id(url)) is not None:
            return source_id(youtube_id=youtube), template.format(id=youtube)
        if not re.match(r"https?://[^/\s]+", url):
            raise ValueError(f"address {url[:80]!r} is not http or https")
        return source_id(url=url), url
    if path := str(row.get("path") or "").strip():
        return _local(path, folder)
    if youtube := str(row.get("id") or "").strip():
        return source_id(youtube_id=youtube), template.format(id=youtube)
    raise ValueError("no YouTube id, URL or path")


def _local(path: str, folder: Path | None) -> tuple[str, str]:
    if folder is None:
        raise ValueError(f"path {path[:80]!r} in a manifest that was read from a URL: give a URL")
    address = _plain_path(folder / path)
    if not Path(path).is_absolute() and not Path(address).is_relative_to(folder):
        raise ValueError(f"path {path[:80]!r} leads out of the manifest's folder")
    return source_id(path=address), address


def _youtube_id(url: str) -> str | None:
    try:
        parts = urlsplit(url)
    except ValueError:
        return None
    host = (parts.hostname or "").removeprefix("www.").removeprefix("m.")
    if host == "youtu.be":
        found = parts.path.strip("/")
    elif host in ("youtube.com", "youtube-nocookie.com"):
        found = parse_qs(parts.query).get("v", [""])[0] or re.sub(r"^/(embed|shorts|v|live)/", "", parts.path)
    else:
        return None
    return found if re.fullmatch(r"[\w-]{11}", found, re.ASCII) else None


def _seconds(row: Row, field: str) -> float | None:
    value = row.get(field)
    if not filled(value):
        return None
    seconds = number(value)
    if seconds is None:
        raise ValueError(f"{field} {str(value)[:40]!r} is not a number of seconds")
    return seconds


def _labels(row: Row) -> tuple[str, ...]:
    """A list, or a text of several parted by `|`, `;` or commas; `label` is one name, whatever commas it holds."""
    several = row.get("labels")
    if several is None:
        several = [row["label"]] if filled(row.get("label")) else []
    if isinstance(several, str):
        parting = next((mark for mark in "|;," if mark in several), ",")
        several = several.split(parting)
    if not isinstance(several, (list, tuple)):
        several = [several]
    return tuple(dict.fromkeys(str(label).strip() for label in several if filled(label)))
