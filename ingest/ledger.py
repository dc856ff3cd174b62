"""The record of every row of every manifest: what became of it, and why."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from itertools import groupby
from pathlib import Path
from types import TracebackType

from cmacc.ingest.causes import Cause
from cmacc.ingest.manifest import ClipRequest, Manifest
from cmacc.ingest.outcome import Outcome, SourceVideo

_SCHEMA = """
create table if not exists clips (
    id integer primary key,
    key text unique,               -- null for a bad row
    manifest text not null,
    row integer not null,
    source text not null default '',
    address text not null default '',
    start_s real not null default 0,
    end_s real,
    labels text not null default '[]',
    split text not null default '',
    state text not null check (state in ('pending', 'done', 'failed', 'bad-row')),
    cause text not null default '',
    detail text not null default '',
    attempts integer not null default 0,
    seconds real not null default 0,
    bytes integer not null default 0,
    shard text not null default ''
);
create index if not exists clips_by_state on clips (state, cause);
create unique index if not exists bad_rows on clips (manifest, row) where state = 'bad-row';
"""


@dataclass(frozen=True)
class Counts:
    """Rows by state and failed rows by cause; `rows` is the sum over the states."""

    pending: int = 0
    done: int = 0
    failed: int = 0
    bad_rows: int = 0
    causes: dict[str, int] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return self.pending + self.done + self.failed + self.bad_rows


class Ledger:
    """An SQLite file with one row for each row of the manifests. Each method is one transaction; one process writes at a time.

    A clip is pending, done (staged; `shard` names where it lies once it is in one), failed (with its cause), or a bad row.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.db = sqlite3.connect(path, timeout=60, isolation_level=None, check_same_thread=False)
        self.db.row_factory = sqlite3.Row
        self.db.execute("pragma journal_mode = wal")
        self.db.execute("pragma synchronous = full")
        self.db.executescript(_SCHEMA)

    def add(self, manifest: Manifest) -> None:
        """Enter a manifest; what is entered already keeps its state. A clip that another manifest named first is a bad row."""
        with self._transaction():
            self.db.execute("delete from clips where manifest = ? and state = 'bad-row'", (manifest.name,))
            for r in manifest.requests:
                values = (r.key, r.manifest, r.row, r.source, r.address, r.start_s, r.end_s, json.dumps(r.labels), r.split)
                self.db.execute(
                    """insert into clips (key, manifest, row, source, address, start_s, end_s, labels, split, state)
                    values (?, ?, ?, ?, ?, ?, ?, ?, ?, 'pending')
                    on conflict (key) do update set row = excluded.row, address = excluded.address, labels = excluded.labels,
                    split = excluded.split where manifest = excluded.manifest""",
                    values,
                )
                owner = self.db.execute("select manifest, row from clips where key = ?", (r.key,)).fetchone()
                if owner["manifest"] != r.manifest:
                    self._bad_row(r.manifest, r.row, f"same clip as line {owner['row']} of {owner['manifest']}")
            for bad in manifest.bad_rows:
                self._bad_row(bad.manifest, bad.row, bad.reason)

    def _bad_row(self, manifest: str, row: int, reason: str) -> None:
        self.db.execute(
            "insert into clips (manifest, row, state, cause, detail) values (?, ?, 'bad-row', ?, ?)",
            (manifest, row, Cause.BAD_ROW, reason),
        )

    def pending(self, retry_causes: Iterable[str] = ()) -> list[SourceVideo]:
        """Source videos with clips to do, in the order of the manifests; failed clips of `retry_causes` are to do as well."""
        causes = [str(cause) for cause in retry_causes]
        marks = ", ".join("?" * len(causes))
        rows = self.db.execute(
            f"""select *, min(id) over (partition by source) as first from clips
            where state = 'pending' or (state = 'failed' and cause in ({marks})) order by first, id""",
            causes,
        )
        return [_video(list(group)) for _, group in groupby(rows, key=lambda row: row["source"])]

    def record(self, outcomes: Iterable[Outcome]) -> None:
        """Enter what became of clips. Raises KeyError for a clip that no manifest named."""
        entered = list(outcomes)
        with self._transaction():
            for o in entered:
                changed = self.db.execute(
                    """update clips set state = ?, cause = ?, detail = ?, attempts = attempts + 1, seconds = seconds + ?,
                    bytes = ? where key = ?""",
                    ("failed" if o.cause else "done", o.cause or "", o.detail, o.seconds, o.bytes, o.key),
                )
                if not changed.rowcount:
                    raise KeyError(f"clip {o.key} is in no manifest of this ledger")

    def mark_done(self, keys: Iterable[str], shard: str) -> None:
        """These clips lie in `shard`."""
        with self._transaction():
            self.db.executemany(
                "update clips set state = 'done', cause = '', detail = '', shard = ? where key = ?",
                ((shard, key) for key in keys),
            )

    def reopen(self, keys: Iterable[str]) -> None:
        """These clips are to be done again."""
        with self._transaction():
            self.db.executemany(
                "update clips set state = 'pending', cause = '', detail = '', shard = '' where key = ?", ((key,) for key in keys)
            )

    def staged(self) -> list[tuple[str, str]]:
        """(key, source) of the clips that are done but lie in no shard yet, in the order of the manifests."""
        rows = self.db.execute("select key, source from clips where state = 'done' and shard = '' order by id")
        return [(row["key"], row["source"]) for row in rows]

    def rows(self) -> Iterator[dict[str, object]]:
        """Every row with all its columns, for reports."""
        for row in self.db.execute("select * from clips order by id"):
            yield {name: row[name] for name in row.keys() if name != "id"}  # noqa: SIM118

    def counts(self) -> Counts:
        states = dict(self.db.execute("select state, count(*) from clips group by state").fetchall())
        causes = self.db.execute("select cause, count(*) from clips where state = 'failed' group by cause order by 2 desc, 1")
        pending, done, failed, bad_rows = (states.get(state, 0) for state in ("pending", "done", "failed", "bad-row"))
        return Counts(pending, done, failed, bad_rows, dict(causes.fetchall()))

    def close(self) -> None:
        self.db.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self.db.execute("begin immediate")
        try:
            yield
        except BaseException:
            self.db.execute("rollback")
            raise
        self.db.execute("commit")


def _video(rows: Sequence[sqlite3.Row]) -> SourceVideo:
    columns = [f.name for f in fields(ClipRequest) if f.name != "labels"]
    requests = tuple(ClipRequest(labels=tuple(json.loads(r["labels"])), **{name: r[name] for name in columns}) for r in rows)
    return SourceVideo(rows[0]["source"], rows[0]["address"], requests)
