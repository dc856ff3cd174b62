"""A data set on Google Cloud Storage: the real gcsfs against a small server of its JSON API on 127.0.0.1."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np
import pytest
from media import make_clip, tiny_profile

from cmacc.shards.dataset import Dataset
from cmacc.shards.errors import DatasetError
from cmacc.shards.writer import DatasetWriter


class Objects(BaseHTTPRequestHandler):
    """Bytes and facts of the files in `folder`, as objects of any bucket."""

    folder: Path
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        path = self.folder / unquote(address.path.partition("/o/")[2])
        if not path.is_file():
            self._send(404, b'{"error": {"code": 404, "message": "No such object"}}')
        elif parse_qs(address.query).get("alt") == ["media"]:
            data = path.read_bytes()
            asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
            if not asked:
                self._send(200, data)
            elif asked[1]:
                self._send(206, data[int(asked[1]) : int(asked[2]) + 1 if asked[2] else None])
            else:
                self._send(206, data[-int(asked[2]) :])
        else:
            facts = {"kind": "storage#object", "name": path.name, "bucket": "bucket", "size": str(path.stat().st_size)}
            times = {"generation": "1", "timeCreated": "2026-01-01T00:00:00Z", "updated": "2026-01-01T00:00:00Z"}
            self._send(200, json.dumps({**facts, **times}).encode())

    def _send(self, status: int, data: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder that stands for `gs://bucket`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Here", (Objects,), {"folder": tmp_path}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server.server_port}")
    # else it asks for the kind of bucket by gRPC
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    import fsspec.config

    monkeypatch.setitem(fsspec.config.conf, "gs", {"token": "anon", "endpoint_url": f"http://127.0.0.1:{server.server_port}"})
    yield tmp_path
    server.shutdown()
    server.server_close()


def test_a_data_set_in_a_google_bucket(bucket: Path) -> None:
    clips = [make_clip(i, labels=(f"label {i % 2}",)) for i in range(6)]
    with DatasetWriter(bucket / "data", tiny_profile()) as writer:
        for clip in clips:
            writer.add(clip)
    there = Dataset.open("gs://bucket/data")
    assert [there.read(row, check=True)["mp4"] for row in range(6)] == [clip.members["mp4"] for clip in clips]
    assert there.texts("key", [4, 1]) == [clips[4].key, clips[1].key]
    assert np.array_equal(there.catalog.column("offset"), Dataset.open(bucket / "data").catalog.column("offset"))
    spans = [(0, 100 * i, 100 * i + 50) for i in range(20)]
    tar = (bucket / "data" / "clips-000000.tar").read_bytes()
    assert there.ranges(spans) == [tar[begin:end] for _, begin, end in spans]


def test_what_is_not_there(bucket: Path) -> None:
    with pytest.raises(DatasetError, match=r"gs://bucket/nothing is no data set: it has no dataset\.json"):
        Dataset.open("gs://bucket/nothing")
