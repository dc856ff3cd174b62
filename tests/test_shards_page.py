"""The page of a data set: what is in it, what it plays, and what a hostile or broken clip does to it."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from collections.abc import Iterable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import av
import fsspec
import numpy as np
import pytest
from media import audio_bytes, coded_video, make_clip, tiny_profile, video_bytes
from PIL import Image

from cmacc.shards.clip import Clip
from cmacc.shards.dataset import Dataset
from cmacc.shards.errors import DatasetError
from cmacc.shards.page import selection, write_page
from cmacc.shards.page.charts import bars, count_bins, histogram
from cmacc.shards.page.pictures import LONGEST_S, Sound, frames, log_mel, log_mel_picture, mel_filters
from cmacc.shards.page.preview import preview
from cmacc.shards.writer import DatasetWriter

HOSTILE = "<script>alert(1)</script>"
N = 10


def hostile_clip(i: int) -> Clip:
    clip = make_clip(i, labels=(HOSTILE, f"label {i}"), split='val"><b>' if i % 2 else "train")
    said = (
        (0.0, 0.5, "<img src=x onerror=alert(2)>"),
        (0.5, 0.9, "half a character"),
        (0.9, 1.0, "\x00 عربي"),
        (0.9, 1.0, "4"),
    )
    return replace(clip, facts=replace(clip.facts, captions=said if i % 2 else ()))


def written(path: Path, clips: Iterable[Clip], **options: object) -> Path:
    with DatasetWriter(path, tiny_profile(), provenance={"made by": HOSTILE, "half": "\ud83d"}, **options) as writer:  # type: ignore[arg-type]
        for clip in clips:
            writer.add(clip)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("page") / "set", map(hostile_clip, range(N)))


class Tags(HTMLParser):
    """Every element with its attributes, and the text outside script and style."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {k: v or "" for k, v in attrs}))

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def all(self, tag: str, **attributes: str) -> list[dict[str, str]]:
        return [a for t, a in self.found if t == tag and all(a.get(k.rstrip("_")) == v for k, v in attributes.items())]


def made(data: Path | str, out: Path, **options: object) -> tuple[str, Tags]:
    path = write_page(Dataset.open(data), out / "page.html", **options)  # type: ignore[arg-type]
    assert [p.name for p in out.iterdir()] == ["page.html"]
    text = path.read_text(encoding="utf-8")
    return text, Tags(text)


def embedded(uri: str) -> bytes:
    return base64.b64decode(uri.partition("base64,")[2], validate=True)


def test_what_is_on_it(data: Path, tmp_path: Path) -> None:
    told: list[int] = []
    _, page = made(data, tmp_path, clips=4, on_progress=told.append)
    assert told == [1, 2, 3, 4]
    keys = Dataset.open(data).keys
    buttons = [a["aria-label"] for a in page.all("button")]
    assert buttons == [f"Play {keys[row]}" for row in (0, 3, 6, 9)]
    for video in page.all("video"):
        with av.open(io.BytesIO(embedded(video["src"]))) as file:
            assert sum(1 for _ in file.decode(video=0)) == 8
        with Image.open(io.BytesIO(embedded(video["poster"]))) as poster:
            assert poster.size == (48, 32)
    kinds = [Image.open(io.BytesIO(embedded(a["src"]))).format for a in page.all("img")]
    assert kinds == ["JPEG", "PNG"] * 4
    text = " ".join(page.text)
    for fact in (
        "1.00 s",
        "−12.0 dBFS",
        "motion 3.0",
        "48 × 32",
        "8 fps",
        "0.5–0.9 s",
        "1 more caption",
        "4 of 10 clips",
        "عربي",
    ):
        assert fact in text


def test_nothing_of_the_data_becomes_markup(data: Path, tmp_path: Path) -> None:
    text, page = made(data, tmp_path)
    assert len(page.all("script")) == 1 and HOSTILE not in text and not page.all("b", dir="auto")
    assert not [a for _, a in page.found if any(name.startswith("on") for name in a)]
    assert " ".join(page.text).count(HOSTILE) == N + 2  # every card, the bars, the provenance
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy and "script-src 'sha256-" in policy and "media-src data:" in policy
    addresses = [a[name] for _, a in page.found for name in ("src", "href", "poster", "action") if name in a]
    assert addresses and all(a.startswith("data:") for a in addresses)


def test_split_where_and_seed(data: Path, tmp_path: Path) -> None:
    dataset = Dataset.open(data)
    rows = selection(dataset, "train", "motion >= 4")
    assert rows.tolist() == [4, 6, 8]
    text, page = made(data, tmp_path, rows=rows, said=f"where {HOSTILE}")
    assert len(page.all("button")) == 3 and "3 of 3 clips" in text
    assert [sum(counts_of(figure)) for figure in text.split("<figure")[1:4]] == [3, 3, 3]
    assert re.findall(r'class="count">(\d+)', text) == ["3", "1", "1", "1"]
    drawn = [Tags(write_page(dataset, tmp_path / "d.html", clips=3, seed=s).read_text()).all("button") for s in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2] and len(drawn[2]) == 3
    with pytest.raises(DatasetError, match="in split 'no'"):
        selection(dataset, "no")


def counts_of(figure: str) -> list[int]:
    return [int(n) for n in re.findall(r'data-count="(\d+)"', figure)]


@pytest.mark.parametrize(
    "values",
    [
        np.random.default_rng(0).normal(-30, 10, 5000),
        np.array([0.3, 0.1, 0.2, 0.7, 0.7000000001, 3.0]),
        np.full(7, 10.0),
        np.zeros(3),
        np.array([1.0, np.nan, np.inf, 2.0]),
        np.array([-120.0, 1e9]),
        np.array([1e-9, 2e-9, 5e-9]),
        np.zeros(0),
    ],
)
def test_histogram_counts_add_up(values: np.ndarray) -> None:
    finite = values[np.isfinite(values)]
    edges, counts = count_bins(values)
    assert counts.sum() == len(finite) and len(counts) <= 21
    assert sum(counts_of(histogram("Duration", "seconds", values))) == len(finite)
    if len(finite):
        assert edges[0] <= finite.min() and finite.max() <= edges[-1] and len(edges) == len(counts) + 1
        steps = np.diff(edges)[1:-1]
        assert np.allclose(steps, steps[:1])
        least = np.searchsorted(edges, finite, side="right").clip(max=len(counts)) - 1
        assert np.bincount(least, minlength=len(counts)).tolist() == counts.tolist()


def test_thirty_bars_and_the_rest_in_words() -> None:
    text = bars("Labels", {f"label {i}": 100 - i for i in range(45)}, 200)
    assert text.count("<li>") == 30 and "and 15 more" in text and "width:100.00%" in text and "50 %" in text


def decoded(data: bytes, kind: str) -> list:  # type: ignore[type-arg]
    with av.open(io.BytesIO(data)) as file:
        return list(file.decode(**{kind: 0}))


def pcm(seconds: float = 1.5, rate: int = 16_000) -> bytes:
    out = io.BytesIO()
    with av.open(out, "w", format="wav") as file:
        stream = file.add_stream("pcm_s16le", rate=rate, layout="mono")
        tone = (9000 * np.sin(np.arange(round(seconds * rate)) / 5)).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(tone[None], format="s16", layout="mono")
        frame.sample_rate = rate
        file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return out.getvalue()


@pytest.mark.parametrize("audio", ["flac", "opus", "wav", None])
@pytest.mark.parametrize("codec", ["libx264", "mjpeg", "libvpx-vp9", None])
def test_what_plays_is_what_the_clip_holds(codec: str | None, audio: str | None) -> None:
    if codec is None and audio is None:
        return
    members = {"json": b"{}"}
    if codec:
        members["mp4"] = coded_video(codec)
    if audio:
        members[audio] = pcm() if audio == "wav" else audio_bytes(3, 1.5, codec=audio)
    seen = preview(members)
    assert seen.troubles == () and seen.play is not None and seen.seconds == pytest.approx(1.5, abs=0.03)
    if codec:
        pictures = decoded(seen.play, "video")
        assert len(pictures) == 12 and pictures[0].pts == 0
        greys = [p.to_ndarray(format="gray").mean() for p in pictures]
        assert np.allclose(greys, [p.to_ndarray(format="gray").mean() for p in decoded(members["mp4"], "video")], atol=4)
        with av.open(io.BytesIO(seen.play)) as file:
            assert file.streams.video[0].codec_context.name == ("vp9" if "vp9" in codec else "h264")
    if audio:
        heard = decoded(seen.play, "audio")
        samples, wanted = sum(p.samples for p in heard), sum(p.samples for p in decoded(members[audio], "audio"))
        assert samples == wanted if audio == "flac" else abs(samples - wanted) <= 1024
        with av.open(io.BytesIO(seen.play)) as file:
            assert file.streams.audio[0].codec_context.name == ("aac" if audio == "wav" else audio)


def test_frames_are_of_their_parts_of_the_clip() -> None:
    found = frames(coded_video("libx264"), 4, 16)
    assert [p.size for p in found] == [(16, 16)] * 4
    assert [round(np.asarray(p).mean() / 20) for p in found] == [1, 4, 7, 10]


@pytest.mark.parametrize(("name", "container"), [("webm", "webm"), ("mkv", "matroska"), ("avi", "avi"), ("video.MOV", "mov")])
def test_other_containers(name: str, container: str) -> None:
    seen = preview(
        {name: coded_video("libvpx-vp9" if container == "webm" else "mpeg4" if container == "avi" else "libx264", container)}
    )
    assert seen.troubles == () and seen.play is not None and len(decoded(seen.play, "video")) == 12 and seen.sound_s == 0


def test_sound_inside_the_video_and_a_picture_alone() -> None:
    both = preview({"mp4": video_bytes(), "flac": audio_bytes()}).play
    assert both is not None
    again = preview({"mp4": both})
    assert again.play is not None and again.mel is not None
    assert len(decoded(again.play, "video")) == 8 and sum(f.samples for f in decoded(again.play, "audio")) == 8000
    out = io.BytesIO()
    Image.new("RGBA", (900, 300), "red").save(out, "PNG")
    alone = preview({"png": out.getvalue(), "txt": b"red"})
    assert alone.play is None and alone.troubles == () and alone.poster is not None
    assert Image.open(io.BytesIO(alone.poster)).size == (576, 192)


def test_no_more_than_the_first_minute() -> None:
    seen = preview({"mp4": coded_video("libx264", n=8 * 70, side=16), "wav": pcm(70, 8000)})
    assert seen.play is not None and seen.video_s == seen.sound_s == LONGEST_S
    assert len(decoded(seen.play, "video")) == 8 * LONGEST_S
    assert sum(f.samples for f in decoded(seen.play, "audio")) == pytest.approx(8000 * LONGEST_S, abs=2048)


@pytest.mark.parametrize(
    "data", [b"", b"\x00" * 100, b"#EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n", video_bytes()[:700], audio_bytes()[:60], b"RIFF"]
)
def test_damaged_members_are_told_of(data: bytes) -> None:
    seen = preview({"mp4": data, "flac": audio_bytes()})
    assert seen.sound_s == 1 and seen.play is not None and seen.poster is None
    assert (seen.troubles == ()) == (not data)
    assert all(t.startswith("its mp4 cannot be decoded (") for t in seen.troubles)
    assert preview({"flac": data}).troubles != ()


@pytest.mark.parametrize("member", ["mp4", "webm", "avi", "mkv", "flac", "opus"])
def test_any_damage_leaves_a_preview(member: str) -> None:
    video = {"mp4": ("libx264", "mp4"), "webm": ("libvpx-vp9", "webm"), "avi": ("mpeg4", "avi"), "mkv": ("libx264", "matroska")}
    whole = coded_video(*video[member]) if member in video else audio_bytes(codec=member)
    rng = np.random.default_rng(len(whole))
    told = 0
    for _ in range(40):
        data = bytearray(whole[: rng.integers(len(whole) // 2, len(whole) + 1)])
        for at in rng.integers(0, rng.choice([600, len(data)]), 8):
            data[min(at, len(data) - 1)] = rng.integers(256)
        seen = preview({member: bytes(data)})
        assert seen.play is not None or seen.troubles
        told += bool(seen.troubles)
    assert told > 0


def test_a_single_frame_without_a_length() -> None:
    seen = preview({"mkv": coded_video("mjpeg", "matroska", n=1)})
    assert seen.troubles == () and seen.strip is not None and seen.seconds > 0


def test_a_rate_that_nobody_hears_is_refused() -> None:
    wave = bytearray(pcm(0.1))
    at = wave.index(b"fmt ") + 12
    for rate in (0, 3, 4_000_000_000):
        wave[at : at + 4] = rate.to_bytes(4, "little")
        assert preview({"wav": bytes(wave)}).play is None and preview({"wav": bytes(wave)}).troubles


def test_a_broken_clip_has_a_card_that_says_so(data: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(data, tmp_path / "set"))
    dataset = Dataset.open(broken)
    offset, size = (int(v[1, 0]) for v in dataset.places(slice(0, 2)))
    with (broken / dataset.meta.shards[0].name).open("r+b") as file:
        file.seek(offset)
        file.write(bytes(size))
    (tmp_path / "out").mkdir()
    text, page = made(broken, tmp_path / "out")
    assert len(page.all("article")) == N and len(page.all("video")) == N and text.count('class="trouble"') == 1
    assert "Its mp4 cannot be decoded (" in text
    (broken / dataset.meta.shards[0].name).unlink()
    text, page = made(broken, tmp_path / "out")
    assert len(page.all("article")) == N and not page.all("video")
    assert text.count("It cannot be read: shard clips-000000.tar is missing") == N


def test_one_member_alone(data: Path, tmp_path: Path) -> None:
    whole = [make_clip(i) for i in range(2)]
    for member, pictures in (("mp4", ["JPEG"]), ("flac", ["PNG"])):
        clips = [replace(c, members={member: c.members[member]}) for c in whole]
        written(tmp_path / member, clips, members=(member, "json"))
        (tmp_path / f"of-{member}").mkdir()
        _, page = made(tmp_path / member, tmp_path / f"of-{member}")
        assert len(page.all("video")) == 2
        assert [Image.open(io.BytesIO(embedded(a["src"]))).format for a in page.all("img")] == pictures * 2


def test_shards_made_elsewhere(data: Path, tmp_path: Path) -> None:
    """No profile, a json that is another's."""
    foreign = Path(shutil.copytree(data, tmp_path / "set"))
    meta = json.loads((foreign / "dataset.json").read_text())
    (foreign / "dataset.json").write_text(json.dumps({**meta, "foreign": True, "profile": None}))
    (tmp_path / "out").mkdir()
    text, page = made(foreign, tmp_path / "out")
    assert len(page.all("video")) == N and "made elsewhere" in text and "not all alike" in text


def test_from_any_address_without_its_secrets(data: Path, tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(f"{data}/", "/bucket/set/", recursive=True)
    try:
        _, page = made("memory://bucket/set", tmp_path, clips=2)
        assert len(page.all("video")) == 2
    finally:
        memory.rm("/bucket", recursive=True)
    dataset = Dataset.open(data)
    dataset.url = "s3://name:secret@bucket/set?token=secret"
    assert "secret" not in write_page(dataset, tmp_path / "page.html", clips=0).read_text()


def test_nothing_to_show(tmp_path: Path) -> None:
    written(tmp_path / "set", [])
    (tmp_path / "out").mkdir()
    text, page = made(tmp_path / "set", tmp_path / "out")
    assert "No clip to show" in text and not page.all("article")


def test_log_mel_is_what_torchaudio_computes() -> None:
    torch, torchaudio = pytest.importorskip("torch"), pytest.importorskip("torchaudio")
    for rate, n_fft in ((8000, 512), (16_000, 1024), (48_000, 4096)):
        wave = np.random.default_rng(rate).normal(0, 0.1, rate).astype(np.float32)
        wave += np.sin(2 * np.pi * 1000 * np.arange(rate) / rate).astype(np.float32)
        window = round(0.025 * rate)
        reference = torchaudio.transforms.MelSpectrogram(
            rate,
            n_fft=n_fft,
            win_length=window,
            hop_length=rate // 100,
            n_mels=64,
            pad_mode="constant",
            mel_scale="htk",
            norm=None,
        ).double()(torch.from_numpy(wave).double())
        wanted = 10 * np.log10(np.maximum(reference.numpy(), 1e-10))
        assert np.abs(log_mel(Sound(wave, rate)) - wanted).max() < 1e-3
        assert np.allclose(
            mel_filters(64, n_fft, rate),
            torchaudio.functional.melscale_fbanks(n_fft // 2 + 1, 0, rate / 2, 64, rate).numpy().T,
            atol=1e-5,
        )


@pytest.mark.parametrize(("hertz", "height"), [(250, 55), (1000, 41), (3500, 19)])
def test_frequency_goes_upwards(hertz: float, height: int) -> None:
    wave = np.sin(2 * np.pi * hertz * np.arange(16_000) / 16_000).astype(np.float32)
    wave[:8000] = 0
    picture = np.asarray(log_mel_picture(Sound(wave, 16_000)).convert("RGB")).sum(axis=2)
    assert picture.shape == (64, 101) and abs(int(picture[:, 75].argmax()) - height) <= 1
    assert picture[:, :45].max() < picture[:, 55:].max() / 3


def test_silence_and_a_blip_have_pictures() -> None:
    for samples in (np.zeros(8000, np.float32), np.zeros(1, np.float32), np.ones(500_000, np.float32)):
        picture = log_mel_picture(Sound(samples, 8000))
        assert picture.height == 64 and 1 <= picture.width <= 641
