"""The reshard command: sizes and profiles as people write them, clips encoded anew, and what cannot be."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import av
import pytest
from media import make_clip, tiny_profile

from cmacc.flows import transcoding
from cmacc.flows.reshard import parse_size, reshard
from cmacc.flows.transcoding import encode_anew, parse_profile, transcoder
from cmacc.ingest import IngestFailure
from cmacc.shards.clip import Clip
from cmacc.shards.dataset import Dataset
from cmacc.shards.errors import DatasetError
from cmacc.shards.lint import lint
from cmacc.shards.profile import profile
from cmacc.shards.writer import DatasetWriter

SMALL = "h264:short_side=16,fps=4,gop=4,b_frames=0"


def labelled(i: int) -> Clip:
    clip = make_clip(i, labels=("dog",), split="val")
    return replace(clip, facts=replace(clip.facts, captions=((0.0, 0.5, "wuff"),), duplicate_of="yt_00000000009_0_1"))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    with DatasetWriter(tmp_path / "source", tiny_profile()) as w:
        for i in range(5):
            w.add(labelled(i))
    return tmp_path / "source"


@pytest.mark.parametrize(("text", "size"), [("512MB", 512_000_000), ("256MiB", 256 << 20), ("1000", 1000), ("1.5 GiB", 3 << 29)])
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "-3MB", "many", "3XB"])
def test_wrong_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="write it as 512MB"):
        parse_size(text)


def test_profiles() -> None:
    assert parse_profile("mjpeg") == profile("mjpeg")
    assert parse_profile("h264:short_side=112, fps=16,gop=16") == profile("h264", short_side=112, fps=16, gop=16)
    for text, sentence in {
        "av1": "not known",
        "h264:fps": "without a value",
        "h264:fps=x": "fps",
        "h264:bits=8": "no option",
    }.items():
        with pytest.raises(ValueError, match=sentence):
            parse_profile(text)


def test_transcoded_clips_keep_what_they_are(source: Path, tmp_path: Path) -> None:
    done = reshard.fn([str(source)], str(tmp_path / "out"), transcode=SMALL, order="shuffle:1", split="a:0.5,b:0.5", workers=2)
    assert (done["selected"], done["written"]) == (5, 5)
    out, old = Dataset.open(tmp_path / "out"), Dataset.open(source)
    assert out.profile == parse_profile(SMALL) and lint(tmp_path / "out") == []
    before = dict(zip(old.keys.tolist(), old.catalog.facts(), strict=True))
    for row, (key, facts) in enumerate(zip(out.keys.tolist(), out.catalog.facts(), strict=True)):
        assert (facts.n_frames, facts.fps, facts.height, facts.duration_s) == (4, 4.0, 16, 1.0)
        for name in ("source", "start_s", "end_s", "labels", "duplicate_of"):
            assert getattr(facts, name) == getattr(before[key], name)
        with av.open(io.BytesIO(out.read(row, ("mp4",))["mp4"])) as file:
            assert sum(1 for _ in file.decode(video=0)) == 4
    assert set(out.catalog.texts("split")) <= {"a", "b"}
    again = reshard.fn([str(source)], str(tmp_path / "out"), transcode=SMALL, order="shuffle:1", split="a:0.5,b:0.5", workers=2)
    assert (again["there"], again["written"]) == (5, 0)
    with pytest.raises(DatasetError, match="of another choice"):
        reshard.fn([str(source)], str(tmp_path / "out"), transcode="mjpeg", order="shuffle:1", split="a:0.5,b:0.5")


def test_sources_of_different_profiles_merge_when_transcoded(source: Path, tmp_path: Path) -> None:
    with DatasetWriter(tmp_path / "other", tiny_profile(audio_codec="opus")) as w:
        w.add(make_clip(8, audio="opus"))
    with pytest.raises(DatasetError, match="different profiles"):
        reshard.fn([str(source), str(tmp_path / "other")], str(tmp_path / "x"))
    done = reshard.fn(
        [str(source), str(tmp_path / "other")], str(tmp_path / "out"), transcode=SMALL, limit=6, where="start_s > 20"
    )
    assert done["written"] == 3 and lint(tmp_path / "out") == []


def test_what_cannot_be_decoded_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    broken = replace(labelled(1), members={**labelled(1).members, "mp4": b"no video"})
    made = list(transcoder(parse_profile(SMALL), 1)(iter([labelled(0), broken, labelled(2)])))
    assert [c.key for c in made] == [labelled(0).key, labelled(2).key]
    assert f"clip {broken.key} is left out: undecodable" in caplog.text and "died" not in caplog.text
    with pytest.raises(IngestFailure):
        encode_anew(broken, parse_profile(SMALL))


def test_a_clip_that_kills_its_decoder_costs_itself(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(transcoding, "_pool", _forked)
    monkeypatch.setattr(transcoding, "encode_anew", _deadly)
    clips = [labelled(i) for i in range(9)]
    made = list(transcoder(parse_profile(SMALL), 2)(iter(clips)))
    assert [c.key for c in made] == [c.key for c in clips if c.key != labelled(3).key]
    assert f"clip {labelled(3).key} is left out: the process that decoded it died" in caplog.text


def test_no_decoder_outlives_its_command() -> None:
    work = (
        "import os, time; from contextlib import ExitStack; from cmacc.flows.transcoding import _pool\n"
        "with ExitStack() as held: print(_pool(held, 1).submit(os.getpid).result(), flush=True); time.sleep(60)"
    )
    command = subprocess.Popen([sys.executable, "-c", work], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    with command:
        assert command.stdout
        decoder = int(command.stdout.readline())
        command.kill()
    until = time.monotonic() + 20
    while _runs(decoder) and time.monotonic() < until:
        time.sleep(0.01)
    assert not _runs(decoder)


def _runs(pid: int) -> bool:
    """A zombie that nobody has waited for yet is none that runs."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _forked(held: ExitStack, workers: int) -> ProcessPoolExecutor:
    return held.enter_context(ProcessPoolExecutor(workers, mp_context=get_context("fork")))


def _deadly(clip: Clip, _: object) -> Clip:
    if clip.key == labelled(3).key:
        os._exit(11)
    return clip
