"""Clip lists as people publish them, row by row: a request for a clip, or the reason why a row asks for none."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from http.client import HTTPException
from itertools import chain
from pathlib import Path
from typing import Any, get_args
from urllib.parse import urlsplit

import duckdb

from cmacc.ingest.addresses import ALLOW, YOUTUBE_ID, file_address, shown, web_address, youtube_id
from cmacc.ingest.captions import Caption, Captions
from cmacc.ingest.tables import MEDIA, Format, Row, Rows, Tables, filled, number_of
from cmacc.shards.clip import clip_key, source_id

YOUTUBE = "https://www.youtube.com/watch?v={id}"
_LONGEST_S = 86_400.0
# RuntimeError: of DuckDB, over damaged names and texts
_UNREADABLE = (OSError, HTTPException, duckdb.Error, RuntimeError)


@dataclass(frozen=True, slots=True)
class ClipRequest:
    """One row of a manifest: which seconds of which source video. end_s None: to the end of the source video.

    captions: (start, end, text) of what is said in these seconds, in seconds of the source video.
    """

    row: int
    manifest: str
    source: str
    address: str
    start_s: float = 0.0
    end_s: float | None = None
    labels: tuple[str, ...] = ()
    split: str = ""
    captions: tuple[Caption, ...] = ()

    @property
    def key(self) -> str:
        return clip_key(self.source, self.start_s, self.end_s)


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that asks for no clip; `row` is its line number, `reason` one sentence."""

    manifest: str
    row: int
    reason: str


class Manifest:
    """A clip list: iterated, as often as one likes, it gives a request or a bad row for each row, in the order of the list.

    Rows are read as they are asked for, never held. Two rows may ask for the same clip. A list that breaks off while it is
    read (a disk that fails, a damaged Parquet file) raises ValueError with one sentence.
    """

    def __init__(self, name: str, *parts: Iterable[ClipRequest | BadRow]) -> None:
        self.name = name
        self._parts = parts

    def __iter__(self) -> Iterator[ClipRequest | BadRow]:
        return chain.from_iterable(self._parts)

    @property
    def requests(self) -> tuple[ClipRequest, ...]:
        """All of them at once, for small lists."""
        return tuple(row for row in self if isinstance(row, ClipRequest))

    @property
    def bad_rows(self) -> tuple[BadRow, ...]:
        return tuple(row for row in self if isinstance(row, BadRow))


def read_manifest(
    source: str | Path,
    *,
    format: Format = "auto",
    url_template: str | None = None,
    split: str = "",
    label_column: str = "",
    captions: Captions | str | Path | None = None,
    segment_s: float | None = None,
    allow_private: bool = False,
) -> Manifest:
    """Open a clip list: a file, a folder of media files, one media file, or the http(s) address of a list or a video.

    Lists: AudioSet, VGGSound, Kinetics, ACAV100M, HowTo100M as published; CSV, TSV, JSONL, Parquet with named columns; an
    address a line. format: how to read it; `auto` goes by content. url_template: where a YouTube id is fetched from, with
    `{id}` in it. split: for rows that name none. label_column: the column that holds the label, where its name does not say so.
    captions: HowTo100M's caption.json, whose captions go with the clips of their videos. segment_s: cut the captioned part of
    a video whose row names no end into pieces of so many seconds, one request each; a rest shorter than half of it is dropped.
    allow_private: take `file:` addresses, paths that lead out of the manifest's folder, and addresses in private networks,
    which are bad rows else; so that a list from elsewhere does not read what only this machine can.

    Bad rows are told, never fatal. Raises ValueError, one sentence, for a list that cannot be read or holds no row.
    """
    if format not in get_args(Format):
        raise ValueError(f"manifest format {format!r} is not known; use one of {', '.join(get_args(Format))}")
    template = url_template or YOUTUBE
    if "{id}" not in template:
        raise ValueError(f"url_template {template!r} has no {{id}}; write where the video id goes, e.g. {YOUTUBE}")
    if segment_s is not None and not 0.1 <= segment_s <= _LONGEST_S:
        raise ValueError(f"segment_s is {segment_s:g}; give 0.1 to {_LONGEST_S:g} seconds")
    if captions is not None and not isinstance(captions, Captions):
        captions = Captions(Path(captions))
    remote = str(source).startswith(("http://", "https://"))
    name = web_address(str(source), allow_private=True) if remote else os.path.normpath(Path.cwd() / source)
    reading = _Reading(name, None if remote else str(Path(name).parent), template, split, captions, segment_s, allow_private)
    tables = Tables(label_column)
    rows: Callable[[], Rows]
    try:
        if format == "folder" or (format == "auto" and not remote and Path(name).is_dir()):
            reading, rows = replace(reading, folder=name), lambda: tables.folder(Path(name))
        elif format == "media" or (format == "auto" and _is_media(name, remote)):
            # the operator's own word, wherever it leads
            reading, rows = replace(reading, allow_private=True), lambda: iter([(1, {"url" if remote else "path": name})])
        elif remote:
            copy = _download(name)
            rows = lambda: tables.rows(name, Path(copy.name), format, None)  # noqa: E731
        else:
            rows = lambda: tables.rows(name, Path(name), format, Path(name).parent)  # noqa: E731
        manifest = Manifest(name, _Read(reading, rows))
        empty = next(iter(manifest), None) is None
    except _UNREADABLE as error:
        raise ValueError(f"manifest {name} cannot be read: {error}") from error
    if empty:
        raise ValueError(f"manifest {name} is empty: it names no clip")
    return manifest


def _is_media(name: str, remote: bool) -> bool:
    path = urlsplit(name).path if remote else name
    return path.rpartition(".")[2].lower() in MEDIA or (remote and youtube_id(name) is not None)


def _download(url: str) -> tempfile._TemporaryFileWrapper[bytes]:
    """A copy that lives as long as the object is held."""
    copy = tempfile.NamedTemporaryFile(prefix="manifest-")  # noqa: SIM115
    with urllib.request.urlopen(url, timeout=60) as response:
        shutil.copyfileobj(response, copy)
    copy.flush()
    return copy


@dataclass(frozen=True)
class _Reading:
    """What turns rows into requests. folder: where relative paths start, None for a list from a URL."""

    name: str
    folder: str | None
    template: str
    split: str
    captions: Captions | None
    segment_s: float | None
    allow_private: bool

    def requests(self, line: int, row: Row) -> Iterable[ClipRequest]:
        """The clips that a row asks for: one, or the segments of a captioned video. Raises ValueError with the reason if none."""
        source, address = self._source(row)
        start = _seconds(row, "start") or 0.0
        end = _seconds(row, "end")
        if end is None and (duration := _seconds(row, "duration")) is not None:
            end = start + duration
        if start < 0:
            raise ValueError(f"start is negative ({start:g} s)")
        if end is not None and round(end * 1000) <= round(start * 1000):
            raise ValueError(f"end ({end:g} s) is not after start ({start:g} s)")
        split = row.get("split")
        request = ClipRequest(
            line, self.name, source, address, start, end, _labels(row), str(split).strip() if split else self.split
        )
        _check_text(address, request.split, *request.labels)
        said = _captions(row)
        if self.captions is not None and source.startswith("yt_") and not said:
            said = self.captions.of(source.removeprefix("yt_"))
        if self.segment_s is not None and end is None and not start and (self.captions is not None or said):
            return _segments(request, said, self.segment_s)
        if said:
            _check_text(*(text for _, _, text in said))
            request = replace(request, captions=tuple(c for c in said if c[1] > start and (end is None or c[0] < end)))
        return (request,)

    def _source(self, row: Row) -> tuple[str, str]:
        """(source id, address), from a URL, a path or a YouTube id, in that order; a bare address may be any of them.

        A local file is named by a hash of its absolute path, so that its id is known without reading it: a file that is
        missing today has the id it will have tomorrow, and two folders never clash. Moved files are other source videos.
        """
        url, path, video = (str(row.get(field) or "").strip() for field in ("url", "path", "id"))
        if not url:
            url = next((given for given in (path, video) if "://" in given or given[:5].lower() == "file:"), "")
        if url:
            if (found := youtube_id(url)) is not None or YOUTUBE_ID.fullmatch(url):
                path, video = "", found or url
            elif re.match("file:", url, re.I):
                if not self.allow_private:
                    raise ValueError(f"address {shown(url)} is a file of this machine; {ALLOW}, or write a path")
                path = file_address(url)
            elif "://" in url:
                url = web_address(url, self.allow_private)
                return source_id(url=url), url
            else:
                path = url
        if path:
            address = self._local(path)
            return source_id(path=address), address
        if not video:
            raise ValueError("no YouTube id, URL or path")
        if not YOUTUBE_ID.fullmatch(video):
            raise ValueError(f"{shown(video)} is not a YouTube id: 11 letters, digits, '_' or '-'")
        return source_id(youtube_id=video), self.template.replace("{id}", video)

    def _local(self, path: str) -> str:
        """The absolute path, without `.` and `..`; a link keeps its own name."""
        if self.folder is None:
            if not os.path.isabs(path):  # noqa: PTH117
                raise ValueError(f"path {shown(path)} in a manifest that was read from a URL: give a URL")
            if not self.allow_private:
                raise ValueError(f"path {shown(path)} is a file of this machine, in a manifest that was read from a URL; {ALLOW}")
            return os.path.normpath(path)
        address = os.path.normpath(os.path.join(self.folder, path))  # noqa: PTH118
        if not (self.allow_private or os.path.isabs(path) or address.startswith(self.folder.rstrip("/") + "/")):  # noqa: PTH117
            raise ValueError(f"path {shown(path)} leads out of the manifest's folder; {ALLOW}")
        return address


@dataclass(frozen=True)
class _Read:
    """The rows of a list as requests and bad rows, read again for each iteration."""

    reading: _Reading
    rows: Callable[[], Rows]

    def __iter__(self) -> Iterator[ClipRequest | BadRow]:
        name = self.reading.name
        try:
            for line, row in self.rows():
                try:
                    if isinstance(row, str):
                        raise ValueError(row)
                    yield from self.reading.requests(line, row)
                except UnicodeEncodeError:
                    yield BadRow(name, line, "the row holds characters that are no text")
                except ValueError as error:
                    yield BadRow(name, line, str(error)[:300])
        except _UNREADABLE as error:
            raise ValueError(f"manifest {name} cannot be read: {error}") from error


def _segments(request: ClipRequest, said: tuple[Caption, ...], segment_s: float) -> list[ClipRequest]:
    """Consecutive pieces from the first caption's start to the last one's end, each with the captions that overlap it."""
    if not said:
        raise ValueError("the video has no captions, so none of it is a segment")
    begin, end = max(0.0, min(c[0] for c in said)), max(c[1] for c in said)
    if end > _LONGEST_S:
        raise ValueError(f"captions go on to {end:g} s, longer than any video")
    count = int((end - begin) / segment_s + 0.5)
    if count < 1:
        raise ValueError(f"captions span {end - begin:g} s, less than half a segment")
    held: list[list[Caption]] = [[] for _ in range(count)]
    for caption in said:
        first = max(0, int((caption[0] - begin) // segment_s))
        for i in range(first, count):
            if caption[1] <= begin + i * segment_s:
                break
            held[i].append(caption)
    _check_text(*(text for _, _, text in said))
    edges = [begin + i * segment_s for i in range(count)] + [min(end, begin + count * segment_s)]
    return [replace(request, start_s=edges[i], end_s=edges[i + 1], captions=tuple(held[i])) for i in range(count)]


def _captions(row: Row) -> tuple[Caption, ...]:
    """A list of [start, end, text] or of {"start", "end", "text"}, or JSON of one."""
    given: Any = row.get("captions")
    if not filled(given):
        return ()
    try:
        if isinstance(given, str):
            given = json.loads(given)
        parts = [(c["start"], c["end"], c["text"]) if isinstance(c, dict) else c for c in given]
        said = [(float(start), float(end), str(text)) for start, end, text in parts]
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise ValueError("captions are not a list of [start, end, text]") from error
    if not all(number_of(start) is not None and number_of(end) is not None for start, end, _ in said):
        raise ValueError("captions hold times that are no seconds")
    return tuple(said)


def _check_text(*texts: str) -> None:
    """Raises ValueError for text that not every database keeps: halves of UTF-16 pairs, and the character zero."""
    if b"\0" in "".join(texts).encode():
        raise ValueError("the row holds a zero character")


def _seconds(row: Row, field: str) -> float | None:
    value = row.get(field)
    if value is None or not filled(value):
        return None
    seconds = number_of(value)
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
