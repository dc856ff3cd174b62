"""What the text members of a foreign sample say of its clip: where it comes from, when, what is in it, what is said.

Known without being told: video2dataset (`url`, `videoID`, `yt_meta_dict`, `clips`, `clip_subtitles`, `caption`, `status`),
webdataset's `cls` (a label) and `txt` (a caption), and our own facts.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import parse_qs, urlsplit

from cmacc.shards.clip import Facts, source_id
from cmacc.shards.facts import facts_from_json

_ID = re.compile(r"[A-Za-z0-9_-]{11}")
_OUR_KEY = re.compile(r"(yt_[A-Za-z0-9_-]{11}|(?:url|file)_[0-9a-f]{16})_\d+_(?:\d+|end)")
_CLIP_OF = re.compile(r"(\d+)_\d{5}")  # video2dataset: number of the video, number of the clip
_IDS = ("yt_meta_dict.info.id", "videoID", "video_id", "youtube_id")
_TEXT = 2000  # characters of a name, a caption or a message that are kept


@dataclass(frozen=True)
class Fields:
    """Where to look, as a dotted path into the json member, or as the name of a text member; None: where it is usual."""

    label: str | None = None
    source: str | None = None
    split: str | None = None
    caption: str | None = None

    def to_json(self) -> dict[str, str | None]:
        return asdict(self)


@dataclass(frozen=True)
class Said:
    """source: id of the source video. start_s, end_s: the instants cut from it, end_s None when that is not said.
    captions: (from, to, text), seconds from the clip's start, to is None for its end. ours: the facts, where they are our own.
    failed: why the maker has no media of it, "" when nothing is said of that."""

    source: str
    start_s: float = 0.0
    end_s: float | None = None
    labels: tuple[str, ...] = ()
    split: str = ""
    captions: tuple[tuple[float, float | None, str], ...] = ()
    ours: Facts | None = None
    failed: str = ""


def said(key: str, texts: dict[str, bytes], fields: Fields) -> Said:
    """texts: bytes of the text members, by extension in lower case. Raises ValueError when the json member is no JSON object."""
    found: dict[str, Any] = {}
    ours = None
    if "json" in texts:
        try:
            loaded = json.loads(texts["json"])
        except (ValueError, RecursionError) as e:
            raise ValueError(f"the json member is not JSON ({str(e)[:200]})") from e
        if not isinstance(loaded, dict):
            raise ValueError("the json member is not a JSON object")
        found = loaded
        try:
            ours = facts_from_json(texts["json"])
        except (ValueError, OverflowError):
            ours = None
    start_s, end_s = _times(found.get("clips"))
    if ours is not None:
        start_s, end_s = _finite(ours.start_s, 0.0), _finite(ours.end_s, None)
    labels = _labels(_first(found, texts, (fields.label,) if fields.label else ("labels", "label", "cls")))
    split = _text(_first(found, texts, (fields.split or "split",)))
    failed = _text(found.get("status")) if str(found.get("status") or "").startswith("failed") else ""
    return Said(
        source=_clean(ours.source) if ours is not None and not fields.source else _source(key, found, texts, fields.source),
        start_s=start_s or 0.0, end_s=end_s, labels=labels, split=split, ours=ours,
        captions=_captions(found, texts, fields.caption, start_s or 0.0, ours),
        failed=": ".join(p for p in (failed, _text(found.get("error_message")) if failed else "") if p),
    )  # fmt: skip


def _look(found: Any, path: str) -> Any:
    if isinstance(found, dict) and path in found:
        return found[path]
    head, dot, rest = path.partition(".")
    if isinstance(found, list) and head.isdecimal() and int(head) < len(found):
        return _look(found[int(head)], rest) if dot else found[int(head)]
    return _look(found[head], rest) if dot and isinstance(found, dict) and head in found else None


def _first(found: dict[str, Any], texts: dict[str, bytes], names: Iterable[str]) -> Any:
    for name in names:
        value = _look(found, name)
        if value is None and name != "json" and name in texts:
            value = texts[name].decode(errors="replace").strip()
        if value not in (None, "", []):
            return value
    return None


def _clean(text: str) -> str:
    """Without what UTF-8 cannot hold."""
    return text.encode(errors="replace").decode()[:_TEXT]


def _text(value: Any) -> str:
    if isinstance(value, bool) or value is None or isinstance(value, dict | list):
        return ""
    return _clean(str(value)).strip()


def _labels(value: Any) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(dict.fromkeys(text for text in map(_text, values) if text))


def _finite(value: float, other: float | None) -> float | None:
    return value if math.isfinite(value) else other


def _source(key: str, found: dict[str, Any], texts: dict[str, bytes], field: str | None) -> str:
    if field and (text := _text(_first(found, texts, (field,)))):
        return source_of(text)
    for name in () if field else _IDS:
        if _ID.fullmatch(text := _text(_look(found, name))):
            return source_id(youtube_id=text)
    if not field and (text := _text(found.get("url"))):
        return source_of(text)
    if ours := _OUR_KEY.fullmatch(key):
        return ours[1]
    clip = _CLIP_OF.fullmatch(key)
    return source_id(path=clip[1] if clip else key)


def source_of(text: str) -> str:
    """Id of the source video that a URL, a YouTube id or any other name stands for."""
    if _ID.fullmatch(text):
        return source_id(youtube_id=text)
    try:
        parts = urlsplit(text)
        host = (parts.hostname or "").removeprefix("www.").removeprefix("m.").removeprefix("music.")
    except ValueError:
        return source_id(path=text)
    named = ""
    if host in ("youtube.com", "youtube-nocookie.com"):
        head, _, rest = parts.path.lstrip("/").partition("/")
        named = (
            rest.partition("/")[0] if head in ("shorts", "embed", "live", "v") else "".join(parse_qs(parts.query).get("v", ()))
        )
    elif host == "youtu.be":
        named = parts.path.strip("/")
    if _ID.fullmatch(named):
        return source_id(youtube_id=named)
    return source_id(url=text) if parts.scheme and host else source_id(path=text)


def _seconds(value: Any) -> float | None:
    """Of a number, or of `H:MM:SS.f`."""
    try:
        if isinstance(value, str):
            seconds = 0.0
            for part in value.split(":"):
                seconds = seconds * 60 + float(part)
        else:
            seconds = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return seconds if math.isfinite(seconds) and seconds >= 0 else None


def _times(clips: Any) -> tuple[float | None, float | None]:
    """Of video2dataset's `clips`, which names one interval in the json of a clip, and all of them in that of a whole video."""
    if isinstance(clips, list) and len(clips) == 1:
        clips = clips[0]
    if not (isinstance(clips, list) and len(clips) == 2):
        return None, None
    start_s, end_s = map(_seconds, clips)
    return (start_s, end_s) if start_s is not None and end_s is not None and start_s < end_s else (None, None)


def _captions(
    found: dict[str, Any], texts: dict[str, bytes], field: str | None, start_s: float, ours: Facts | None
) -> tuple[tuple[float, float | None, str], ...]:
    if ours is not None and not field:
        return tuple((a, b, _clean(t)) for a, b, t in ours.captions)
    lines = found.get("clip_subtitles") if not field else None
    if lines is None and not field:
        languages = _look(found, "yt_meta_dict.subtitles")
        lines = next(iter(languages.values()), None) if isinstance(languages, dict) else None
    spoken = list(_subtitles(lines, start_s)) if isinstance(lines, list) else []
    if spoken:
        return tuple(spoken)
    text = _text(_first(found, texts, (field,) if field else ("caption", "txt")))
    return ((0.0, None, text),) if text else ()


def _subtitles(lines: list[Any], start_s: float) -> Iterable[tuple[float, float | None, str]]:
    for line in lines:
        begin, end = (_seconds(_look(line, name)) for name in ("start", "end"))
        words = _look(line, "lines")
        if isinstance(words, dict):
            words = next(iter(words.values()), None)
        text = " ".join(_text(w) for w in words) if isinstance(words, list) else _text(words)
        if begin is not None and end is not None and end > max(begin, start_s) and text:
            yield max(0.0, begin - start_s), end - start_s, text
