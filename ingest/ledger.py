"""The record of every row of every manifest: what became of it, and why."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby, islice
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import sqlalchemy as sa

from cmacc.ingest import ledger_sql as sql
from cmacc.ingest.causes import Cause
from cmacc.ingest.manifest import BadRow, ClipRequest, Manifest
from cmacc.ingest.outcome import Outcome, SourceVideo

PARTS = 4096
"""Source videos are dealt to so many parts by a hash of their id; a worker takes a range of them."""

_ROWS_AT_ONCE = 2000
_FULL_BYTES = 1 << 20


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


@dataclass(frozen=True)
class Part:
    """The share `number` of `of` of the source videos, by their ids' hash; the default is all of them."""

    number: int = 0
    of: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.number < self.of <= PARTS:
            raise ValueError(f"part {self.number} of {self.of} is none; give a number from 0, of 1 to {PARTS} parts")

    @property
    def bounds(self) -> dict[str, int]:
        return {"low": PARTS * self.number // self.of, "high": PARTS * (self.number + 1) // self.of}


@dataclass(frozen=True)
class Totals:
    """Sums over some time: clips, source videos, bytes written and bytes downloaded, in `seconds`."""

    done: int = 0
    failed: int = 0
    bytes: int = 0
    fetched: int = 0
    videos: int = 0
    seconds: float = 0.0


class Ledger:
    """One row for each row of the manifests. Each method is one transaction; several processes may work on it at once.

    where: a path (SQLite) or a database's URL (`postgresql://user@host/name`). A clip is pending, done (staged; `shard`
    names where it lies once it is in one), failed (with its cause, and the time of another attempt if its cause has one) or
    a bad row. Raises ValueError, one sentence, when there is no such database, OSError when its disk is full.
    """

    def __init__(self, where: Path | str) -> None:
        self.where = where
        self.sqlite = isinstance(where, Path) or "://" not in where
        if self.sqlite:
            Path(where).parent.mkdir(parents=True, exist_ok=True)
            url = sa.URL.create("sqlite", database=str(where))
        else:
            url = _url(str(where))
        self.engine = sa.create_engine(url, pool_size=4, max_overflow=64, connect_args={"timeout": 60} if self.sqlite else {})
        if self.sqlite:
            sa.event.listen(self.engine, "connect", _prepare)
            sa.event.listen(self.engine, "handle_error", self._no_room)
        try:
            with self._writing() as db:
                sql.TABLES.create_all(db)
        except sa.exc.DBAPIError as error:
            self.close()
            raise ValueError(f"the ledger {url.render_as_string()} cannot be opened: {_says(error)}; mend its URL") from error

    # --- rows in ---

    def add(self, manifest: Manifest) -> None:
        """Enter a manifest, row by row; what is entered already keeps its state.

        A clip that another row named first is a bad row. Rows that an earlier reading of this manifest had and this one has
        not are taken out, unless they are done.
        """
        with self._writing() as db:
            before = db.execute(sa.text("select pass from manifests where name = :name"), {"name": manifest.name}).scalar()
            number = 1 + (before or 0)
            at = {"manifest": manifest.name, "pass": number}
            db.execute(sa.text("delete from clips where manifest = :manifest and state = 'bad-row'"), at)
            rows = iter(manifest)
            while batch := list(islice(rows, _ROWS_AT_ONCE)):
                self._enter(db, batch, at)
            db.execute(sa.text("delete from clips where manifest = :manifest and pass < :pass and state <> 'done'"), at)
            db.execute(
                sa.text(
                    "insert into manifests (name, pass) values (:manifest, :pass) "
                    "on conflict (name) do update set pass = excluded.pass"
                ),
                at,
            )

    def _enter(self, db: sa.Connection, batch: Sequence[ClipRequest | BadRow], at: dict[str, Any]) -> None:
        requests = [row for row in batch if isinstance(row, ClipRequest)]
        bad = [{**at, "row": row.row, "detail": row.reason} for row in batch if isinstance(row, BadRow)]
        if requests:
            sources = {r.source: {"source": r.source, "address": r.address, **_place(r)} for r in requests}
            db.execute(
                sa.text(
                    "insert into sources (source, address, host, part) values (:source, :address, :host, :part) "
                    "on conflict (source) do update set address = excluded.address, host = excluded.host"
                ),
                list(sources.values()),
            )
            db.execute(sa.text(sql.ENTER), [{**at, **_values(r)} for r in requests])
            keys = [r.key for r in requests]
            owners = db.execute(
                sa.select(sql.CLIPS.c.key, sql.CLIPS.c.manifest, sql.CLIPS.c.row).where(sql.CLIPS.c.key.in_(keys))
            )
            owner = {row.key: (row.manifest, row[2]) for row in owners}
            for r, key in zip(requests, keys, strict=True):
                if owner[key] != (at["manifest"], r.row):
                    name, row = owner[key]
                    where = f"line {row}" if name == at["manifest"] else f"line {row} of {name}"
                    bad.append({**at, "row": r.row, "detail": f"same clip as {where}"})
        if bad:
            db.execute(
                sa.text(
                    "insert into clips (manifest, pass, row, state, cause, detail) "
                    f"values (:manifest, :pass, :row, 'bad-row', '{Cause.BAD_ROW}', :detail)"
                ),
                sorted(bad, key=lambda row: row["row"]),
            )

    # --- work out ---

    def todo(self, part: Part = Part(), *, closed: Iterable[str] = (), now: float | None = None) -> Iterator[SourceVideo]:
        """Source videos with clips to work on, in the order of the manifests, read from the ledger as they are taken.

        closed: hosts of which nothing is wanted. now: Unix time, by which a failed clip must be due.
        """
        where = part.bounds | {"now": time.time() if now is None else now, "closed": list(closed), "n": 16, "after": 0}
        ids = sa.text(sql.TODO_IDS).bindparams(sa.bindparam("closed", expanding=True, type_=sa.Text))
        clips = sa.text(sql.TODO).bindparams(sa.bindparam("ids", expanding=True, type_=sa.BigInteger))
        while True:
            with self._reading() as db:
                found = list(db.execute(ids, where).scalars())
                videos = db.execute(clips, {**where, "ids": found}).mappings().all() if found else []
            if not found:
                return
            where["after"] = found[-1]
            yield from (_video(list(group)) for _, group in groupby(videos, key=lambda row: row["source_id"]))

    def count_todo(self, part: Part = Part(), now: float | None = None) -> tuple[int, int]:
        """(clips, source videos) that `todo` would give."""
        where = part.bounds | {"now": time.time() if now is None else now}
        with self._reading() as db:
            clips, videos = db.execute(sa.text(sql.COUNT_TODO), where).one()
        return clips, videos

    def left(self) -> dict[str, tuple[int, int]]:
        """host: (source videos, clips) that are to be worked on now or later; local files are host ``."""
        with self._reading() as db:
            return {row.host: (row.videos, row.clips) for row in db.execute(sa.text(sql.LEFT))}

    def next_due(self, part: Part = Part()) -> float | None:
        """Unix time at which the next failed clip is due again; None when none is."""
        with self._reading() as db:
            found = db.execute(sa.text(sql.NEXT_DUE), part.bounds).scalar()
        return None if found is None else float(found)

    def retry(self, causes: Iterable[str]) -> None:
        """Failed clips of these causes are due now."""
        with self._writing() as db:
            db.execute(
                sa.update(sql.CLIPS)
                .where(sql.CLIPS.c.state == "failed", sql.CLIPS.c.cause.in_([str(c) for c in causes]))
                .values(due_at=0)
            )

    # --- what became of it ---

    def record(self, outcomes: Iterable[Outcome], now: float | None = None) -> None:
        """Enter what became of clips. Raises KeyError for a clip that no manifest named."""
        entered = list(outcomes)
        if not entered:
            return
        now = time.time() if now is None else now
        minute = {
            "minute": int(now // 60),
            "done": sum(o.cause is None for o in entered),
            "failed": sum(o.cause is not None for o in entered),
            "bytes": sum(o.bytes for o in entered),
            "fetched": sum(o.fetched for o in entered),
            "videos": len({o.source for o in entered}),
        }
        with self._writing() as db:
            # one order of rows for all, or two workers wait for each other
            changed = db.execute(sa.text(sql.RECORD), [_record(o, now) for o in sorted(entered, key=lambda o: o.key)])
            if changed.rowcount != len(entered):
                known = set(db.execute(sa.select(sql.CLIPS.c.key).where(sql.CLIPS.c.key.in_([o.key for o in entered]))).scalars())
                lost = next((o.key for o in entered if o.key not in known), "one of them")
                raise KeyError(f"clip {lost} is in no manifest of this ledger")
            db.execute(sa.text(sql.MINUTE), minute)

    def mark_done(self, keys: Iterable[str], shard: str) -> None:
        """These clips lie in `shard`."""
        self._each("state = 'done', cause = '', detail = '', due_at = null, shard = :shard", keys, shard=shard)

    def reopen(self, keys: Iterable[str]) -> None:
        """These clips are to be done again."""
        self._each(
            "state = 'pending', cause = '', detail = '', due_at = 0, shard = '', fingerprint = '', duplicate_of = ''", keys
        )

    def refuse(self, keys: Iterable[str], cause: Cause, detail: str) -> None:
        """These clips failed for good, whatever was tried; they are not done, nor will be."""
        self._each("state = 'failed', cause = :cause, detail = :detail, due_at = null", keys, cause=str(cause), detail=detail)

    def _each(self, change: str, keys: Iterable[str], **values: str) -> None:
        rows = [{"key": key, **values} for key in sorted(keys)]
        if rows:
            with self._writing() as db:
                db.execute(sa.text(f"update clips set {change} where key = :key"), rows)

    def moved(self, shard: str, to: str) -> None:
        """What lay in `shard` lies in the shard `to`."""
        with self._writing() as db:
            db.execute(sa.text("update clips set shard = :to where shard = :shard"), {"shard": shard, "to": to})

    # --- reports ---

    def staged(self, part: Part = Part()) -> list[dict[str, str]]:
        """key, source and duplicate_of of the clips that are done but lie in no shard yet, in the order of the manifests."""
        with self._reading() as db:
            return [dict(row) for row in db.execute(sa.text(sql.STAGED), part.bounds).mappings()]

    def shards(self) -> dict[str, int]:
        """Clips by the name of their shard."""
        with self._reading() as db:
            found = db.execute(sa.text("select shard, count(*) from clips where shard <> '' and state = 'done' group by shard"))
            return {row.shard: int(row[1]) for row in found}

    def keys_of_shard(self, shard: str) -> list[str]:
        with self._reading() as db:
            return list(
                db.execute(sa.select(sql.CLIPS.c.key).where(sql.CLIPS.c.shard == shard, sql.CLIPS.c.state == "done")).scalars()
            )

    def fingerprints(self) -> Iterator[tuple[str, str]]:
        """(key, fingerprint) of the done clips that have one, in the order in which they were asked for."""
        with self._reading() as db:
            where = "select key, fingerprint from clips where state = 'done' and fingerprint <> '' order by id"
            for row in db.execution_options(yield_per=_ROWS_AT_ONCE).execute(sa.text(where)):
                yield row.key, row.fingerprint

    def rows(self) -> Iterator[dict[str, Any]]:
        """Every row with all its columns, for reports."""
        columns = [c for c in sql.CLIPS.c if c.name not in ("id", "source_id", "pass")] + [
            sql.SOURCES.c.source,
            sql.SOURCES.c.address,
        ]
        joined = sql.CLIPS.outerjoin(sql.SOURCES, sql.SOURCES.c.id == sql.CLIPS.c.source_id)
        with self._reading() as db:
            query = sa.select(*columns).select_from(joined).order_by(sql.CLIPS.c.id)
            for row in db.execution_options(yield_per=_ROWS_AT_ONCE).execute(query).mappings():
                yield {**row, "source": row["source"] or "", "address": row["address"] or ""}

    def counts(self) -> Counts:
        with self._reading() as db:
            found = db.execute(sa.text("select state, cause, count(*) from clips group by state, cause")).all()
        states = {state: sum(n for s, _, n in found if s == state) for state in ("pending", "done", "failed", "bad-row")}
        causes = sorted(((cause, n) for state, cause, n in found if state == "failed"), key=lambda pair: (-pair[1], pair[0]))
        return Counts(states["pending"], states["done"], states["failed"], states["bad-row"], dict(causes))

    def totals(self, since: float = 0.0, now: float | None = None) -> Totals:
        """What was recorded from Unix time `since` on; `seconds` run from the first such minute to now."""
        with self._reading() as db:
            row = db.execute(sa.text(sql.TOTALS), {"since": int(since // 60)}).one()
        if row[0] is None:
            return Totals()
        seconds = (time.time() if now is None else now) - 60.0 * row[0]
        done, failed, written, fetched, videos = map(int, row[1:])
        return Totals(done, failed, written, fetched, videos, max(seconds, 1.0))

    # --- hosts: who is closed, and whose turn it is ---

    def close_host(self, host: str, until: float, cause: Cause, detail: str) -> None:
        """Nothing is asked of this host before Unix time `until`."""
        values = {"host": host, "until": until, "cause": str(cause), "detail": detail}
        with self._writing() as db:
            db.execute(sa.text(sql.CLOSE), values)

    def closed_hosts(self, now: float | None = None) -> dict[str, tuple[float, str, str]]:
        """host: (Unix time until which it is closed, cause, detail)."""
        with self._reading() as db:
            rows = db.execute(
                sa.text("select * from hosts where closed_until > :now"), {"now": time.time() if now is None else now}
            )
            return {row.host: (row.closed_until, row.cause, row.detail) for row in rows}

    def turn(self, host: str, gap_s: float, now: float | None = None) -> float:
        """Take the host's next turn, gap_s seconds after the one before; returns its Unix time, `now` or later.

        One bucket for everyone who works on this ledger.
        """
        now = time.time() if now is None else now
        with self._writing() as db:
            return float(db.execute(sa.text(sql.TURN), {"host": host, "now": now, "gap": gap_s}).scalar_one()) - gap_s

    # --- inside ---

    @contextmanager
    def _writing(self) -> Iterator[sa.Connection]:
        with self.engine.begin() as db:
            if self.sqlite:
                db.exec_driver_sql("begin immediate")
            yield db

    @contextmanager
    def _reading(self) -> Iterator[sa.Connection]:
        with self.engine.connect() as db:
            yield db

    def _no_room(self, context: sa.engine.ExceptionContext) -> None:
        """Raises OSError (ENOSPC) where SQLite says in its own ways that the disk is full."""
        name = getattr(context.original_exception, "sqlite_errorname", "")
        full = name == "SQLITE_FULL" or (
            name.startswith("SQLITE_IOERR") and shutil.disk_usage(Path(self.where).parent).free < _FULL_BYTES
        )
        if full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.where)) from context.original_exception

    def close(self) -> None:
        self.engine.dispose()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _url(text: str) -> sa.URL:
    try:
        url = sa.make_url(text)
    except sa.exc.ArgumentError as error:
        raise ValueError("the ledger's URL cannot be read; write it as postgresql://user:password@host:5432/database") from error
    if url.drivername in ("postgresql", "postgres"):
        return url.set(drivername="postgresql+psycopg")
    raise ValueError(f"a ledger cannot live in {url.drivername}; give a file's path, or postgresql://user:password@host/database")


def _prepare(connection: Any, _: object) -> None:
    """SQLite: transactions begin where we say so; a reader never waits for a writer; a commit is on the disk."""
    connection.isolation_level = None
    for pragma in ("journal_mode = wal", "synchronous = full"):
        connection.execute(f"pragma {pragma}")


def _says(error: sa.exc.DBAPIError) -> str:
    return " ".join(str(error.orig).split())[:200]


def host_of(address: str) -> str:
    """Lower-case host of an address, without `www.`, with its port if it has a rare one; `` for a local path."""
    if "://" not in address:
        return ""
    try:
        parts = urlsplit(address)
        host, port = (parts.hostname or "").removeprefix("www."), parts.port
    except ValueError:
        return ""
    if host in ("youtu.be", "m.youtube.com"):
        return "youtube.com"
    return host if port in (None, 80, 443) else f"{host}:{port}"


def _place(request: ClipRequest) -> dict[str, Any]:
    return {"host": host_of(request.address), "part": zlib.crc32(request.source.encode()) % PARTS}


def _values(r: ClipRequest) -> dict[str, Any]:
    return {
        "key": r.key, "row": r.row, "source": r.source, "start_s": r.start_s, "end_s": r.end_s, "labels": json.dumps(r.labels),
        "split": r.split, "captions": json.dumps(r.captions) if r.captions else "",
    }  # fmt: skip


def _record(o: Outcome, now: float) -> dict[str, Any]:
    rule = o.cause.retry if o.cause else None
    return {
        "key": o.key, "state": "failed" if o.cause else "done", "cause": str(o.cause or ""), "detail": o.detail,
        "seconds": o.seconds, "bytes": o.bytes, "fetched": o.fetched, "fingerprint": o.fingerprint,
        "duplicate_of": o.duplicate_of, "times": rule.times if rule else 0, "due": now + (rule.after_s if rule else 0),
    }  # fmt: skip


def _video(rows: Sequence[Any]) -> SourceVideo:
    first = rows[0]
    same = ("row", "manifest", "source", "address", "start_s", "end_s", "split")
    requests = tuple(
        ClipRequest(**{name: r[name] for name in same}, labels=tuple(json.loads(r["labels"])), captions=_captions(r["captions"]))
        for r in rows
    )
    return SourceVideo(first["source"], first["address"], requests, first["host"], first["source_id"])


def _captions(text: str) -> tuple[tuple[float, float, str], ...]:
    return tuple((float(begin), float(end), str(words)) for begin, end, words in json.loads(text or "[]"))
