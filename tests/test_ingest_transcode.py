"""Cutting: picture and sound at the same instants, exact lengths, the same bytes each time, a cause for everything else."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from test_ingest_media import clapper, clicks, ffmpeg, flashes, samples, truth

from cmacc.ingest import Cause, ClipRequest, IngestFailure, Limits, transcode
from cmacc.ingest.cut import Cut
from cmacc.ingest.source import Picture, _Sounds
from cmacc.shards.clip import Clip
from cmacc.shards.profile import PROFILES, Profile, profile

SMALL = profile("h264", short_side=64, gop=10)
FOLDER = Path(__file__).parents[1].parent / "shared" / "data"


def request(start_s: float = 0.0, end_s: float | None = None, row: int = 1) -> ClipRequest:
    return ClipRequest(row, "list.csv", "url_0123456789abcdef", "a.mp4", start_s, end_s, ("clap",), "train")


def cut(path: Path, *spans: tuple[float, float | None], to: Profile = SMALL, limits: Limits | None = None) -> list[Clip]:
    """The clips of these spans, in their order; any failure is raised."""
    requests = [request(start, end, row) for row, (start, end) in enumerate(spans)]
    made = {r.key: outcome for r, outcome in transcode(path, requests, to, limits)}
    assert set(made) == {r.key for r in requests}
    for outcome in made.values():
        if isinstance(outcome, IngestFailure):
            raise outcome
    return [clip for r in requests if isinstance(clip := made[r.key], Clip)]


def cause(path: Path, start_s: float = 0.0, end_s: float | None = None, limits: Limits | None = None) -> Cause:
    """The cause why this span of it makes no clip."""
    ((_, outcome),) = transcode(path, [request(start_s, end_s)], SMALL, limits)
    assert isinstance(outcome, IngestFailure), "a clip was made"
    assert outcome.detail
    return outcome.cause


def assert_claps(clip: Clip, path: Path, sound: str = "flac", heard_s: float = 0.002) -> None:
    """Flashes and clicks lie where the source has them: within half a frame, and within 2 ms."""
    start, end = clip.facts.start_s, clip.facts.end_s
    seen, heard = flashes(clip.members["mp4"]), clicks(clip.members[sound])
    to_see, to_hear = ([clap - start for clap in claps if start <= clap < end] for claps in truth(path))
    assert len(to_see) == len(to_hear) > 0
    assert len(seen) == len(to_see), (seen, to_see)
    assert np.allclose(seen, to_see, atol=0.501 / clip.facts.fps), (seen, to_see)
    assert len(heard) == len(to_hear), (heard, to_hear)
    assert np.allclose(heard, to_hear, atol=heard_s), (heard, to_hear)


@pytest.mark.parametrize("container", ["mp4", "mkv", "webm", "ts", "avi", "flv", "mpg", "mov"])
def test_picture_and_sound_are_cut_at_the_same_instants(tmp_path: Path, container: str) -> None:
    path = clapper(tmp_path / f"a.{container}", seconds=5, claps=(1.0, 2.52, 4.2))
    whole, middle, tail = cut(path, (0.0, None), (0.7, 3.3), (2.31, 4.6))
    for clip, claps in ((whole, 3), (middle, 2), (tail, 2)):
        assert_claps(clip, path)
        seen, heard = flashes(clip.members["mp4"]), clicks(clip.members["flac"])
        assert len(seen) == claps
        # within a frame of each other, but for the delay that a muxer of the source did not note
        assert np.allclose(seen, heard, atol=0.041 + (0.024 if container == "avi" else 0))
    assert 4.7 <= whole.facts.duration_s <= 5.1


SOUNDS = {"flac 16 kHz": ("flac", 16_000), "flac 48 kHz": ("flac", 48_000), "opus": ("opus", 48_000)}


@pytest.mark.parametrize("container", ["mp4", "mkv", "webm", "ts"])
@pytest.mark.parametrize("sound", SOUNDS)
def test_every_sound_format_is_cut_with_the_picture(tmp_path: Path, sound: str, container: str) -> None:
    """To a frame and to 10 ms: of the source, and of each other."""
    codec, rate = SOUNDS[sound]
    path = clapper(tmp_path / f"a.{container}", seconds=5, claps=(1.0, 2.52, 4.2))
    to = profile("h264", short_side=64, audio_codec=codec, audio_rate=rate)
    for clip in cut(path, (0.0, 4.8), (0.712, 3.312), (2.3, 4.58), to=to):
        assert_claps(clip, path, codec, heard_s=0.01)
        wave, found_rate = samples(clip.members[codec])
        assert (found_rate, len(wave)) == (rate, round(clip.facts.duration_s * rate))
        seen, heard = flashes(clip.members["mp4"]), clicks(clip.members[codec])
        assert np.allclose(seen, heard, atol=1 / clip.facts.fps)


def test_a_clip_is_exactly_as_long_as_asked(tmp_path: Path) -> None:
    path = clapper(tmp_path / "a.mp4", seconds=3.9)
    for clip, seconds in zip(cut(path, (0.0, 4.0), (1.37, 2.77), (0.123, 0.923)), (4.0, 1.4, 0.8), strict=True):
        assert clip.facts.n_frames == seconds * 25
        assert clip.facts.duration_s == seconds
        assert len(samples(clip.members["flac"])[0]) == seconds * 16000
        with av.open(io.BytesIO(clip.members["mp4"])) as container:
            assert sum(1 for _ in container.decode(video=0)) == clip.facts.n_frames


def test_what_the_source_lacks_at_the_end_is_filled_only_within_the_slack(tmp_path: Path) -> None:
    path = clapper(tmp_path / "a.mp4", seconds=3.5)
    assert cause(path, 0.0, 4.0) is Cause.TOO_SHORT
    assert cause(path, 8.0, 10.0) is Cause.TOO_SHORT
    assert cause(path, 1.0, 1.2) is Cause.TOO_SHORT
    assert cut(path, (0.0, 4.0), limits=Limits(slack_s=0.6))[0].facts.n_frames == 100


def test_a_clip_without_an_end_is_capped(tmp_path: Path) -> None:
    (clip,) = cut(clapper(tmp_path / "a.mp4"), (1.0, None), limits=Limits(max_clip_s=2.0))
    assert (clip.facts.start_s, clip.facts.end_s, clip.facts.n_frames) == (1.0, 3.0, 50)


def test_variable_frame_rate_becomes_constant(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    times = sorted({*np.round(np.cumsum(rng.uniform(0.004, 0.13, 70)), 3), 1.0, 2.52})
    times = [0.0, *(t for t in times if t < 4)]
    path = clapper(tmp_path / "a.mp4", times=times)
    (clip,) = cut(path, (0.3, 3.6))
    assert_claps(clip, path)
    with av.open(io.BytesIO(clip.members["mp4"])) as container:
        stamps = [f.pts * f.time_base for f in container.decode(video=0)]
    assert {after - before for before, after in pairwise(stamps)} == {1 / SMALL.fps} or np.allclose(np.diff(stamps), 1 / 25)
    assert len(stamps) == round(3.3 * 25)


def test_a_frame_rate_that_doubles_or_halves(tmp_path: Path) -> None:
    for fps in (10, 50):
        path = clapper(tmp_path / f"{fps}.mp4", fps=fps, claps=(1.0, 2.6))
        (clip,) = cut(path, (0.2, 3.2))
        assert clip.facts.n_frames == 75
        assert_claps(clip, path)


def test_clocks_that_do_not_start_at_zero(tmp_path: Path) -> None:
    late = tmp_path / "late.ts"
    ffmpeg("-i", clapper(tmp_path / "a.ts"), "-c", "copy", "-output_ts_offset", 3000, late)
    with av.open(str(late)) as container:
        assert container.start_time > 2e9
    assert_claps(cut(late, (0.5, 3.5))[0], late)
    # seconds count from the origin of the file, so sound that sets in later leaves the picture where it is
    delayed = clapper(tmp_path / "b.mkv", sound_delay_s=0.2, claps=(1.0,))
    (clip,) = cut(delayed, (0.5, 3.5))
    assert np.allclose(flashes(clip.members["mp4"]), [0.5], atol=0.04)
    assert np.allclose(clicks(clip.members["flac"]), [0.7], atol=0.01)
    (whole,) = cut(delayed, (0.0, None))
    assert whole.facts.start_s == pytest.approx(0.2, abs=0.03)


def test_an_edit_list_is_obeyed(tmp_path: Path) -> None:
    trimmed = tmp_path / "trimmed.mp4"
    ffmpeg("-ss", 0.76, "-i", clapper(tmp_path / "a.mp4", gop=100), "-c", "copy", trimmed)
    (clip,) = cut(trimmed, (0.1, 3.0))
    assert_claps(clip, trimmed)
    assert np.allclose(clicks(clip.members["flac"]), [0.14, 1.66], atol=0.01)


@pytest.mark.parametrize("order", ["va", "av"])
def test_the_last_frame_is_not_lost_in_the_decoder(tmp_path: Path, order: str) -> None:
    path = tmp_path / "b.mp4"
    streams = [word for kind in order for word in ("-map", f"0:{kind}")]
    ffmpeg("-i", clapper(tmp_path / "a.mp4", claps=(3.96,)), *streams, "-c:a", "copy", "-c:v", "libx264", "-bf", 3, path)
    for clip in cut(path, (2.0, 4.0), (2.0, None)):
        assert_claps(clip, path)
        assert clip.facts.end_s == pytest.approx(4.0, abs=0.001)


@pytest.mark.parametrize(("container", "gop"), [("mp4", 70), ("mkv", 70), ("ts", 70), ("ts", 300), ("avi", 70)])
def test_far_apart_clips_of_a_long_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, container: str, gop: int) -> None:
    decoded = []
    take = Cut.take
    monkeypatch.setattr(Cut, "take", lambda self, moment: (decoded.append(isinstance(moment, Picture)), take(self, moment))[1])
    path = tmp_path / f"a.{container}"
    clapper(path, seconds=64, fps=10, claps=(3.0, 31.0, 32.5, 60.0), size=(64, 32), gop=gop, rate=32000)
    first, second, third = cut(path, (2.0, 5.0), (30.5, 33.0), (59.0, 62.0))
    for clip, number in ((first, 1), (second, 2), (third, 1)):
        assert_claps(clip, path)
        assert len(flashes(clip.members["mp4"])) == number
    if container in ("mp4", "mkv"):
        assert sum(decoded) < 250, "what no clip wants is jumped over: 640 frames are in the source"


def test_streams_that_are_not_interleaved(tmp_path: Path) -> None:
    path = clapper(tmp_path / "a.mkv", seconds=50, fps=10, claps=(3.0, 45.0), size=(32, 32), interleave=False)
    for clip in cut(path, (2.0, 5.0), (44.0, 47.0)):
        assert_claps(clip, path)


def test_rotation_is_applied(tmp_path: Path) -> None:
    upright, turned = clapper(tmp_path / "a.mp4", size=(96, 64), claps=()), tmp_path / "turned.mp4"
    for degrees in (90, 180, 270):
        ffmpeg("-display_rotation", degrees, "-i", upright, "-c", "copy", turned)
        reference = tmp_path / "reference.mkv"
        ffmpeg("-i", turned, "-c:v", "ffv1", "-c:a", "copy", reference)  # ffmpeg turns by itself
        (clip,) = cut(turned, (0.0, 2.0))
        assert (clip.facts.width, clip.facts.height) == ((96, 64) if degrees == 180 else (64, 96))
        with av.open(io.BytesIO(clip.members["mp4"])) as ours, av.open(str(reference)) as theirs:
            for _, a, b in zip(range(20), ours.decode(video=0), theirs.decode(video=0), strict=False):
                difference = a.to_ndarray(format="gray").astype(int) - b.to_ndarray(format="gray")
                assert np.abs(difference).mean() < 6


def test_sizes_stay_even_and_are_not_enlarged(tmp_path: Path) -> None:
    for number, (size, expected) in enumerate(
        {(97, 75): (82, 64), (50, 30): (50, 30), (8, 8): (8, 8), (640, 128): (320, 64)}.items()
    ):
        path = clapper(tmp_path / f"{number}.mkv", size=size, codecs=("ffv1", "flac"))
        (clip,) = cut(path, (0.0, 2.0))
        assert (clip.facts.width, clip.facts.height) == expected


def test_ten_bits_full_range_and_other_samplings_become_plain(tmp_path: Path) -> None:
    for name, pix_fmt, codec in (
        ("a", "yuv420p10le", "ffv1"),
        ("b", "yuvj420p", "mjpeg"),
        ("c", "yuv444p", "ffv1"),
        ("d", "bgr0", "ffv1"),
    ):
        (clip,) = cut(clapper(tmp_path / f"{name}.mkv", pix_fmt=pix_fmt, codecs=(codec, "flac")), (0.9, 2.0))
        with av.open(io.BytesIO(clip.members["mp4"])) as container:
            frames = list(container.decode(video=0))
        assert frames[0].format.name == "yuv420p"
        white = max(float(f.to_ndarray()[:64].mean()) for f in frames)
        assert 225 < white < 240, "white is 235 in limited range"


def test_full_range_is_read_from_the_tag(tmp_path: Path) -> None:
    coding = ("-vf", "scale=out_range=full", "-pix_fmt", "yuv420p", "-color_range", "pc", "-c:v", "libvpx-vp9", "-cpu-used", 8)
    ffmpeg("-i", clapper(tmp_path / "a.mkv"), *coding, "-deadline", "realtime", "-c:a", "copy", tmp_path / "b.mkv")
    (clip,) = cut(tmp_path / "b.mkv", (0.9, 2.0))
    with av.open(io.BytesIO(clip.members["mp4"])) as container:
        white = max(float(f.to_ndarray()[:64].mean()) for f in container.decode(video=0))
    assert 225 < white < 240


@pytest.mark.parametrize("name", [*PROFILES, "opus"])
def test_every_profile_keeps_its_promises(tmp_path: Path, name: str) -> None:
    to = profile("vp9", audio_codec="opus") if name == "opus" else PROFILES[name]
    path = clapper(tmp_path / "a.mp4", size=(160, 120))
    (clip,) = cut(path, (0.5, 3.5), to=to)
    assert set(clip.members) == {"mp4", to.audio_codec}
    assert clip.facts.keyframes == tuple(range(0, 75, to.gop))
    video, audio = clip.members["mp4"], clip.members[to.audio_codec]
    assert video.index(b"moov") < video.index(b"mdat")
    with av.open(io.BytesIO(video)) as container:
        assert [s.type for s in container.streams] == ["video"]
        assert container.streams[0].codec_context.name.removeprefix("lib").startswith(to.codec[:3])
        packets = [p for p in container.demux() if p.size]
    assert len(packets) == 75
    if not to.b_frames:
        assert [p.pts for p in packets] == sorted(p.pts for p in packets)
    wave, rate = samples(audio)
    assert rate == (48000 if to.audio_codec == "opus" else 16000)
    assert len(wave) == 3 * rate
    assert np.allclose(flashes(video), [0.5, 2.02], atol=0.04)
    assert np.allclose(clicks(audio), [0.5, 2.02], atol=0.01)


def test_the_same_clip_gives_the_same_bytes(tmp_path: Path) -> None:
    path = clapper(tmp_path / "a.mp4", seconds=5)
    for to in (SMALL, profile("vp9", short_side=64, audio_codec="opus"), profile("mjpeg", short_side=64)):
        (alone,) = cut(path, (1.0, 3.0), to=to)
        among = cut(path, (0.0, 4.0), (1.0, 3.0), (2.5, 4.5), to=to, limits=Limits(decoder_threads=3))[1]
        assert alone == among
        assert alone.members == among.members


def test_facts_are_measured(tmp_path: Path) -> None:
    quiet, loud = (cut(clapper(tmp_path / f"{n}.mov", level=n / 100, claps=(), rate=16000), (1.0, 3.0))[0].facts for n in (1, 10))
    assert quiet.loudness_db == pytest.approx(-40, abs=1)
    assert loud.loudness_db == pytest.approx(-20, abs=1)
    assert quiet.motion > 1
    assert (quiet.labels, quiet.split, quiet.start_s, quiet.end_s) == (("clap",), "train", 1.0, 3.0)


def test_what_is_no_clip_has_a_cause(tmp_path: Path) -> None:
    good = clapper(tmp_path / "good.mp4")
    data = good.read_bytes()
    files = {
        "empty.mp4": b"",
        "text.mp4": b"<html>not found</html>" * 40,
        "noise.mp4": np.random.default_rng(0).bytes(9999),
        "headless.mp4": data[: len(data) // 2],
        "list.m3u8": b"#EXTM3U\n#EXTINF:4,\ngood.mp4\n#EXT-X-ENDLIST\n",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        assert cause(tmp_path / name) is Cause.UNDECODABLE, name
    ffmpeg("-i", good, "-movflags", "empty_moov+frag_keyframe", "-c", "copy", tmp_path / "fragments.mp4")
    header = (tmp_path / "fragments.mp4").read_bytes()
    (tmp_path / "init.mp4").write_bytes(header[: header.index(b"moof") - 4])
    assert cause(tmp_path / "init.mp4") is Cause.UNDECODABLE
    key = "00112233445566778899aabbccddeeff"
    ffmpeg(
        "-i",
        good,
        "-c",
        "copy",
        "-encryption_scheme",
        "cenc-aes-ctr",
        "-encryption_key",
        key,
        "-encryption_kid",
        key,
        tmp_path / "e.mp4",
    )
    assert cause(tmp_path / "e.mp4") is Cause.ENCRYPTED
    assert cause(tmp_path / "e.mp4", 0.0, 2.0) is Cause.ENCRYPTED
    assert cause(clapper(tmp_path / "mute.mp4", sound=False)) is Cause.NO_AUDIO
    assert cause(clapper(tmp_path / "blind.mp4", picture=False)) is Cause.NO_VIDEO
    cover = ("-frames:v", 1, "-c:a", "copy", "-c:v", "mjpeg", "-disposition:v", "attached_pic", tmp_path / "cover.m4a")
    ffmpeg("-i", tmp_path / "blind.mp4", "-i", good, "-map", "0:a", "-map", "1:v", *cover)
    assert cause(tmp_path / "cover.m4a") is Cause.NO_VIDEO
    assert cause(clapper(tmp_path / "silent.mp4", claps=(), level=0)) is Cause.SILENT
    assert cause(clapper(tmp_path / "still.mp4", moving=False)) is Cause.STILL


def test_a_still_picture_with_the_noise_of_its_encoding_is_still(tmp_path: Path) -> None:
    path = tmp_path / "slide.mp4"
    slide = tmp_path / "slide.png"
    ffmpeg("-f", "lavfi", "-i", "mandelbrot=size=320x180:end_scale=0.3", "-frames:v", 1, slide)
    coding = ("-t", 12, "-r", 25, "-pix_fmt", "yuv420p", "-g", 60, "-crf", 32, "-preset", "veryfast")
    ffmpeg("-loop", 1, "-i", slide, "-f", "lavfi", "-i", "anoisesrc=amplitude=0.1", *coding, path)
    assert cause(path, 1.0, 11.0) is Cause.STILL


@pytest.mark.parametrize("lost", [True, False])
def test_damage_costs_only_the_clips_it_lies_in(tmp_path: Path, lost: bool) -> None:
    path = clapper(tmp_path / "a.ts", seconds=12, claps=(1.0, 10.0), size=(320, 208))
    data = bytearray(path.read_bytes())
    begin, end = len(data) * 34 // 100, len(data) * 71 // 100
    data[begin:end] = bytes(end - begin) if lost else np.random.default_rng(0).bytes(end - begin)
    path.write_bytes(data)
    outcomes = dict(
        zip("abc", (o for _, o in transcode(path, [request(0.5, 3), request(4.5, 7.5), request(9, 11)], SMALL)), strict=True)
    )
    assert isinstance(outcomes["a"], Clip)
    assert isinstance(outcomes["c"], Clip)
    assert len(flashes(outcomes["c"].members["mp4"])) == len(clicks(outcomes["c"].members["flac"])) == 1
    assert np.allclose(flashes(outcomes["c"].members["mp4"]), clicks(outcomes["c"].members["flac"]), atol=0.04)
    assert isinstance(outcomes["b"], IngestFailure)
    assert outcomes["b"].cause is Cause.UNDECODABLE


@pytest.mark.parametrize("kind", ["video", "audio"])
def test_packets_that_do_not_decode_and_packets_that_are_not_there(tmp_path: Path, kind: str) -> None:
    def rewrite(name: str, change: Callable[[av.Packet], av.Packet | None]) -> Path:
        with av.open(str(path)) as source, av.open(str(tmp_path / name), "w") as out:
            streams = {s.index: out.add_stream_from_template(s) for s in source.streams}
            for packet in source.demux():
                inside = packet.stream.type == kind and packet.pts is not None and 1.6 < packet.pts * packet.time_base < 2.4
                kept = change(packet) if inside else packet
                if kept is not None and kept.size:
                    kept.stream = streams[packet.stream_index]
                    out.mux(kept)
        return tmp_path / name

    def garble(packet: av.Packet) -> av.Packet:
        spoilt = av.Packet(b"\xff" * packet.size)
        spoilt.pts, spoilt.dts, spoilt.time_base = packet.pts, packet.dts, packet.time_base
        return spoilt

    path = clapper(tmp_path / "a.mkv", codecs=("mpeg4", "ac3"), gop=1, claps=(1.0, 3.0))
    garbled = rewrite("garbled.mkv", garble)
    assert cause(garbled, 0.5, 3.5) is Cause.UNDECODABLE
    cut(garbled, (0.0, 1.2), (2.6, 3.6))
    # what is left out is a picture that stays, or a pause of the sound
    (clip,) = cut(rewrite("left_out.mkv", lambda _: None), (0.5, 3.5))
    assert_claps(clip, path)


def test_a_clock_that_jumps_back_is_a_desync(tmp_path: Path) -> None:
    first, again = clapper(tmp_path / "a.ts", seconds=6), tmp_path / "again.ts"
    again.write_bytes(first.read_bytes() * 2)
    assert cause(again, 3.0, 9.0) is Cause.DESYNC
    assert len(flashes(cut(again, (0.5, 3.5))[0].members["mp4"])) == 2


def test_the_default_stream_is_taken(tmp_path: Path) -> None:
    first, second = (clapper(tmp_path / f"{clap}.mp4", claps=(clap,)) for clap in (1.0, 2.0))
    chosen = [word for kind in "va" for word in (f"-disposition:{kind}:0", 0, f"-disposition:{kind}:1", "default")]
    ffmpeg("-i", first, "-i", second, "-map", 0, "-map", 1, "-c", "copy", *chosen, tmp_path / "both.mkv")
    (clip,) = cut(tmp_path / "both.mkv", (0.5, 3.5))
    assert np.allclose(flashes(clip.members["mp4"]), [1.5], atol=0.02)
    assert np.allclose(clicks(clip.members["flac"]), [1.5], atol=0.01)


def test_sound_of_any_layout_and_rate(tmp_path: Path) -> None:
    for number, (channels, rate) in enumerate((("mono", 8000), ("5.1", 48000), ("stereo", 96000))):
        path = clapper(tmp_path / f"{number}.mkv", channels=channels, rate=rate, codecs=("libx264", "flac"))
        assert_claps(cut(path, (0.5, 3.5))[0], path)


def test_the_first_stamp_places_the_sound_before_it() -> None:
    class Frames:
        """A packet that decodes to these frames, of 0.1 s each."""

        def __init__(self, *stamps: int | None) -> None:
            self.stamps = stamps

        def decode(self) -> list[av.AudioFrame]:
            frames = [av.AudioFrame.from_ndarray(np.full((1, 800), 0.5, np.float32), "fltp", "mono") for _ in self.stamps]
            for frame, stamp in zip(frames, self.stamps, strict=True):
                frame.sample_rate, frame.time_base, frame.pts = 8000, Fraction(1, 8000), stamp
            return frames

    sounds = _Sounds(SimpleNamespace(origin=Fraction(0), clockless=False), rate=16000)  # type: ignore[arg-type]
    packets = [Frames(None, None), Frames(4000), Frames(None, 5600), Frames(None)]
    heard = [*(piece for packet in packets for piece in sounds.feed(packet)), *sounds.flush()]  # type: ignore[arg-type]
    assert heard[0].first == (4000 - 1600) * 2
    for before, after in pairwise(heard):
        assert after.first == before.first + len(before.data)
    assert abs(sum(len(piece.data) for piece in heard) - 6 * 1600) < 40


def test_a_long_source_is_not_held_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "long.mp4"
    ffmpeg(
        "-f",
        "lavfi",
        "-i",
        "testsrc2=size=640x360:rate=25",
        "-f",
        "lavfi",
        "-i",
        "anoisesrc",
        "-t",
        30,
        "-preset",
        "ultrafast",
        path,
    )
    code = f"""
import resource
from pathlib import Path
from cmacc.ingest import ClipRequest, transcode
from cmacc.shards.profile import profile
to = profile("h264", short_side=64)
def cut(end_s):
    (made,) = transcode(Path({str(path)!r}), [ClipRequest(1, "m", "url_0123456789abcdef", "a", 0.0, end_s)], to)
    assert hasattr(made[1], "members"), made
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
print(cut(2.0), cut(30.0))
"""
    short, long = map(int, subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout.split())
    assert long - short < 60, f"{long - short} MiB more for 28 s more, of which the frames are 242 MiB"


def test_limits_say_what_to_change() -> None:
    with pytest.raises(ValueError, match="give more than 0 and at most max_clip_s"):
        Limits(min_clip_s=90)
    with pytest.raises(ValueError, match="give 0 or more"):
        Limits(slack_s=-1)


ODD = {
    Cause.NO_AUDIO: "1_1.ts av1_video.mkv corrupted.mp4 webm.webm video_5s.ivf sample_vvc.mp4 water_180_mvhevc_5frames.mov",
    Cause.NO_VIDEO: "testMP4AudioOnly.mp4 sample_dts_hd_ma.mp4 sample_ac4_level4_fragmented.mp4",
    Cause.SILENT: "404.mp4 preroll-5s.mp4 transparent.webm fixture.asf",
    Cause.TOO_SHORT: "muxed.ts fixture.webm dolbyVision-hdr.MOV sample_with_vobsub.mp4",
    Cause.UNDECODABLE: "cram.avi fixture-corrupt.mkv sintel-video-init.mp4 multidrm-video-init.mp4 WindowsMediaVideo.wmv s1.mp4",
}


@pytest.mark.skipif(not (FOLDER / "odd").is_dir(), reason=f"no folder of odd files at {FOLDER / 'odd'}")
def test_every_odd_file_ends_as_a_clip_or_with_the_right_cause() -> None:
    expected = {name: why for why, names in ODD.items() for name in names.split()}
    for path in sorted((FOLDER / "odd").iterdir()):
        ((_, outcome),) = transcode(path, [request()], SMALL)
        if path.name in expected:
            assert isinstance(outcome, IngestFailure), path.name
            assert outcome.cause is expected[path.name], path.name
        elif isinstance(outcome, Clip):
            assert outcome.facts.n_frames * 640 == len(samples(outcome.members["flac"])[0]), path.name
    made = [
        cut(FOLDER / "odd" / name, (0.0, None))[0] for name in ("rotate-buck-bunny.mp4", "with-gps.mov", "no-initial-keyframe.ts")
    ]
    assert [(c.facts.width < c.facts.height) for c in made] == [True, True, False]
