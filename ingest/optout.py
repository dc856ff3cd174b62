"""Videos whose makers asked to be left out: a list of them, and whether a clip is of one."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from cmacc.ingest.addresses import YOUTUBE_ID, plain_address, shown, youtube_id
from cmacc.ingest.lines import lines
from cmacc.ingest.manifest import ClipRequest
from cmacc.shards.clip import source_id

_SOURCE = re.compile(r"(?:yt_[A-Za-z0-9_-]{11}|(?:url|file)_[0-9a-f]{16})")
_KEY = re.compile(rf"({_SOURCE.pattern})_\d+_(?:\d+|end)")


@dataclass(frozen=True)
class OptOut:
    """Source videos and single clips that are not to be taken, whichever way a video is written.

    A YouTube video is the same by its id and in every form of its address; any other address by its host, path and query.
    """

    sources: frozenset[str] = frozenset()
    addresses: frozenset[str] = frozenset()
    keys: frozenset[str] = frozenset()

    @classmethod
    def read(cls, path: Path) -> OptOut:
        """A file of YouTube ids, addresses, source ids or clip keys, one a line; `#` begins a comment.

        Raises ValueError, one sentence with the line, for a line that is none of these, or for a file that cannot be read.
        """
        sources, addresses, keys = set[str](), set[str](), set[str]()
        try:
            for number, line in lines(path):
                text = re.sub(r"(^|\s)#.*", "", line or "?").strip()
                if not text:
                    continue
                if _KEY.fullmatch(text):
                    keys.add(text)
                elif source := _source(text):
                    sources.add(source)
                elif address := _address(text):
                    addresses.add(address)
                    sources.add(source_id(url=text))
                else:
                    raise ValueError(
                        f"{path}, line {number}: {shown(text)} is no YouTube id, address, source id or clip key; mend the line"
                    )
        except OSError as error:
            raise ValueError(f"opt-out list {path} cannot be read: {error}") from error
        return cls(frozenset(sources), frozenset(addresses), frozenset(keys))

    def opted_out(self, clip: ClipRequest | str) -> bool:
        """Whether a request, or a video or clip written in any form that a list may have, is not to be taken."""
        if isinstance(clip, ClipRequest):
            by_address = bool(self.addresses) and _address(clip.address) in self.addresses
            return clip.source in self.sources or by_address or (bool(self.keys) and clip.key in self.keys)
        if key := _KEY.fullmatch(clip):
            return clip in self.keys or key[1] in self.sources
        source = _source(clip)
        return source in self.sources if source else _address(clip) in self.addresses


def _source(text: str) -> str | None:
    """The source id of a YouTube video in any form, or the source id that the text is."""
    if YOUTUBE_ID.fullmatch(text):
        return source_id(youtube_id=text)
    if (found := youtube_id(text)) is not None:
        return source_id(youtube_id=found)
    return text if _SOURCE.fullmatch(text) else None


def _address(text: str) -> str | None:
    """What all spellings of a web address share; None if it is none."""
    if not re.match("https?://", text, re.I):
        return None
    try:
        return plain_address(text)
    except ValueError:
        return None
