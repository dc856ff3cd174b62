"""What is said in videos, from HowTo100M's caption.json: gigabytes of JSON, read once into a file that answers by video."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import tempfile
from pathlib import Path
from urllib.parse import quote

import ijson

Caption = tuple[float, float, str]
"""(start, end, text) in seconds of the source video"""

_BATCH = 1000
_LONGEST_S = 1e7


class Captions:
    """Captions by video id, from `{video_id: {"start": [...], "end": [...], "text": [...]}}`.

    The first use streams the JSON into an SQLite file, which appears by rename, complete; later uses open that. cache: its
    path, else it lies in the folder of temporary files, named by the JSON's path, size and time. Memory does not grow with
    the JSON. Raises ValueError, one sentence, if it cannot be read.
    """

    def __init__(self, path: Path, cache: Path | None = None) -> None:
        try:
            state = path.stat()
            name = hashlib.sha256(f"{path.resolve()} {state.st_size} {state.st_mtime_ns}".encode()).hexdigest()[:16]
            self.path = cache or Path(tempfile.gettempdir()) / f"captions-{name}.sqlite"
            if not self.path.is_file():
                _build(path, self.path)
            self._db = sqlite3.connect(f"file:{quote(str(self.path))}?mode=ro", uri=True, check_same_thread=False)
            self._db.execute("select captions from videos limit 1")
        except (OSError, sqlite3.Error, ijson.JSONError) as error:
            raise ValueError(f"captions {path} cannot be read: {error}") from error

    def of(self, video_id: str) -> tuple[Caption, ...]:
        """The captions of a video in order of their start; none if nothing is known of it."""
        found = self._db.execute("select captions from videos where id = ?", (video_id,)).fetchone()
        return tuple((start, end, text) for start, end, text in json.loads(found[0])) if found else ()


def _build(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="captions-") as folder:
        aside = Path(folder) / target.name
        db = sqlite3.connect(aside)
        try:
            # nothing is lost with a file that is not whole: it is made again
            db.executescript("pragma journal_mode = off; pragma synchronous = off;")
            db.execute("create table videos (id text primary key, captions text not null)")
            with source.open("rb") as file, db:
                rows = ((video, _packed(entry)) for video, entry in ijson.kvitems(file, "", use_float=True))
                if not db.executemany("insert or replace into videos values (?, ?)", rows).rowcount:
                    raise ValueError(f"captions {source} name no video; give JSON of {{video id: {{start, end, text}}}}")
        finally:
            db.close()
        aside.replace(target)


def _packed(entry: object) -> str:
    """The entry as JSON of [start, end, text] in order; what is no caption is left out."""
    columns = [entry.get(name) for name in ("start", "end", "text")] if isinstance(entry, dict) else []
    if not columns or not all(isinstance(column, list) for column in columns):
        return "[]"
    said = []
    for start, end, text in zip(*columns, strict=False):
        times = isinstance(start, int | float) and isinstance(end, int | float) and 0 <= start < end < _LONGEST_S
        if times and isinstance(text, str) and (text := text.strip()):
            said.append((float(start), float(end), text))
    return json.dumps(sorted(said))
