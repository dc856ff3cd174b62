"""The ledger's tables and statements, in the SQL that SQLite and PostgreSQL have in common."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa


def _text(name: str) -> sa.Column[Any]:
    return sa.Column(name, sa.Text, nullable=False, server_default="")


def _real(name: str) -> sa.Column[Any]:
    return sa.Column(name, sa.Double, nullable=False, server_default="0")


def _int(name: str) -> sa.Column[Any]:
    return sa.Column(name, sa.BigInteger, nullable=False, server_default="0")


TABLES = sa.MetaData()
_ID = sa.BigInteger().with_variant(sa.Integer, "sqlite")  # SQLite numbers rows by itself only under this name

MANIFESTS = sa.Table(
    "manifests", TABLES,
    sa.Column("name", sa.Text, primary_key=True),
    _int("pass"),
)  # fmt: skip
SOURCES = sa.Table(
    "sources", TABLES,
    sa.Column("id", _ID, primary_key=True),
    sa.Column("source", sa.Text, nullable=False, unique=True),
    _text("address"),
    _text("host"),
    _int("part"),
)  # fmt: skip
CLIPS = sa.Table(
    "clips", TABLES,
    sa.Column("id", _ID, primary_key=True),
    sa.Column("key", sa.Text, unique=True),  # null for a bad row
    _text("manifest"),
    _int("row"),
    _int("pass"),  # the reading of the manifest that named it last
    sa.Column("source_id", sa.BigInteger),
    _real("start_s"),
    sa.Column("end_s", sa.Double),
    _text("labels"),
    _text("split"),
    _text("captions"),
    sa.Column("state", sa.Text, sa.CheckConstraint("state in ('pending', 'done', 'failed', 'bad-row')"), nullable=False),
    _text("cause"),
    _text("detail"),
    sa.Column("due_at", sa.Double),  # Unix time from which on it is to be worked on; null: not by itself
    _int("attempts"),
    _real("seconds"),
    _int("bytes"),
    _int("fetched"),
    _text("shard"),
    _text("fingerprint"),
    _text("duplicate_of"),
)  # fmt: skip
_DUE = CLIPS.c.due_at.is_not(None)
sa.Index("clips_due", CLIPS.c.source_id, CLIPS.c.due_at, sqlite_where=_DUE, postgresql_where=_DUE)
sa.Index("clips_by_state", CLIPS.c.state, CLIPS.c.cause)
sa.Index("clips_by_shard", CLIPS.c.shard, CLIPS.c.state)
sa.Index("clips_by_source", CLIPS.c.source_id)
_MINUTES = sa.Table(
    "minutes", TABLES,  # what was recorded in each minute of Unix time
    sa.Column("minute", sa.BigInteger, primary_key=True, autoincrement=False),
    *(_int(name) for name in ("done", "failed", "bytes", "fetched", "videos")),
)  # fmt: skip
_HOSTS = sa.Table(
    "hosts", TABLES,
    sa.Column("host", sa.Text, primary_key=True),
    _real("closed_until"),
    _text("cause"),
    _text("detail"),
    _real("next_at"),
)  # fmt: skip

ENTER = """
insert into clips (key, manifest, row, pass, source_id, start_s, end_s, labels, split, captions, state, due_at)
values (:key, :manifest, :row, :pass, (select id from sources where source = :source), :start_s, :end_s, :labels, :split,
        :captions, 'pending', 0)
on conflict (key) do update set row = excluded.row, pass = excluded.pass, labels = excluded.labels, split = excluded.split,
    captions = excluded.captions where clips.manifest = excluded.manifest and clips.pass < excluded.pass
"""
TODO_IDS = """
select distinct c.source_id from clips c join sources s on s.id = c.source_id
where c.due_at <= :now and c.source_id > :after and s.part >= :low and s.part < :high and s.host not in :closed
order by c.source_id limit :n
"""
TODO = """
select c.*, s.source, s.address, s.host from clips c join sources s on s.id = c.source_id
where c.source_id in :ids and c.due_at <= :now order by c.source_id, c.id
"""
COUNT_TODO = """
select count(*), count(distinct c.source_id) from clips c join sources s on s.id = c.source_id
where c.due_at <= :now and s.part >= :low and s.part < :high
"""
LEFT = """
select s.host, count(distinct c.source_id) as videos, count(*) as clips from clips c join sources s on s.id = c.source_id
where c.due_at is not null group by s.host
"""
NEXT_DUE = """
select min(c.due_at) from clips c join sources s on s.id = c.source_id
where c.state = 'failed' and c.due_at is not null and s.part >= :low and s.part < :high
"""
RECORD = """
update clips set state = :state, cause = :cause, detail = :detail, seconds = seconds + :seconds, bytes = :bytes,
    fetched = fetched + :fetched, fingerprint = :fingerprint, duplicate_of = :duplicate_of, attempts = attempts + 1,
    due_at = case when attempts < :times then :due else null end where key = :key
"""
MINUTE = """
insert into minutes (minute, done, failed, bytes, fetched, videos) values (:minute, :done, :failed, :bytes, :fetched, :videos)
on conflict (minute) do update set done = minutes.done + excluded.done, failed = minutes.failed + excluded.failed,
    bytes = minutes.bytes + excluded.bytes, fetched = minutes.fetched + excluded.fetched,
    videos = minutes.videos + excluded.videos
"""
TOTALS = """
select min(minute), sum(done), sum(failed), sum(bytes), sum(fetched), sum(videos) from minutes where minute >= :since
"""
STAGED = """
select c.key, s.source, c.duplicate_of from clips c join sources s on s.id = c.source_id
where c.shard = '' and c.state = 'done' and s.part >= :low and s.part < :high order by c.id
"""
CLOSE = """
insert into hosts (host, closed_until, cause, detail) values (:host, :until, :cause, :detail)
on conflict (host) do update set closed_until = excluded.closed_until, cause = excluded.cause, detail = excluded.detail
"""
TURN = """
insert into hosts (host, next_at) values (:host, :now + :gap)
on conflict (host) do update set next_at = :gap + case when hosts.next_at > :now then hosts.next_at else :now end
returning next_at
"""
