"""The page of a data set in Chromium: it plays, its playhead moves, one clip at a time; on a phone and in the dark."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from media import audio_bytes, coded_video, make_clip, tiny_profile

from cmacc.shards.clip import Clip
from cmacc.shards.dataset import Dataset
from cmacc.shards.page import write_page
from cmacc.shards.writer import DatasetWriter

HOSTILE = ("<script>alert(1)</script>", "<img src=x onerror=alert(2)>", '"><svg onload=alert(3)>', "label " + "long" * 40)
ARGUMENTS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
MOVES = """([head, from]) => new Promise((done) => {
  const video = head.closest(".card").querySelector("video");
  const look = () => video.currentTime > from + 0.2 ? done(head.getBoundingClientRect().left) : requestAnimationFrame(look);
  look();
})"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    names = ("chromium", "chromium-browser", "google-chrome")
    path = os.environ.get("CMACC_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip("no Chromium on this machine; get one by `apt-get install chromium`, or name yours in CMACC_CHROMIUM")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=list(ARGUMENTS))
        yield chromium
        chromium.close()


def clip(i: int, codec: str, audio: str) -> Clip:
    """Three seconds, so that the clip does not end while it is looked at."""
    made = make_clip(i, labels=HOSTILE[: i + 1], split="train", seconds=3.0)
    facts = replace(made.facts, captions=((0.0, 1.0, HOSTILE[1]),))
    return Clip(made.key, facts, {"mp4": coded_video(codec, n=24), audio: audio_bytes(i, 3.0, codec=audio)})


@pytest.fixture(scope="module", params=[("libx264", "flac"), ("libvpx-vp9", "opus"), ("mjpeg", "flac")], ids="-".join)
def page(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of four clips, the last one with a broken picture."""
    codec, audio = request.param
    folder = tmp_path_factory.mktemp("page")
    names = {"libx264": "h264", "libvpx-vp9": "vp9", "mjpeg": "mjpeg"}
    with DatasetWriter(folder / "set", tiny_profile(codec=names[codec], audio_codec=audio)) as writer:
        for i in range(3):
            writer.add(clip(i, codec, audio))
        whole = clip(3, codec, audio)
        writer.add(replace(whole, members={**whole.members, "mp4": bytes(1000)}))
    return write_page(Dataset.open(folder / "set"), folder / "page.html")


@pytest.fixture
def opened(browser: Any, page: Path, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The page in a window as the test asks for; it must say nothing on the console, ask nothing of a network, pop nothing up."""
    context = browser.new_context(**getattr(request, "param", {"viewport": {"width": 1200, "height": 800}}))
    window = context.new_page()
    said: list[str] = []
    window.on("console", lambda message: said.append(message.text))
    window.on("pageerror", lambda error: said.append(str(error)))
    window.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
    window.on("request", lambda asked: said.append(asked.url) if not asked.url.startswith(("file:", "data:")) else None)
    window.goto(page.as_uri())
    yield window
    context.close()
    assert said == []


def test_clips_play_one_at_a_time(opened: Any) -> None:
    first, second = opened.locator(".card").nth(0), opened.locator(".card").nth(1)
    head, video = first.locator(".head"), first.locator("video")
    begin = head.bounding_box()["x"]
    first.locator(".mel").click()
    place = opened.evaluate(MOVES, [head.element_handle(), 0])
    assert place > begin
    assert opened.evaluate(MOVES, [head.element_handle(), 0.4]) > place
    assert video.evaluate("v => v.videoWidth") == 32 and video.evaluate("v => v.webkitAudioDecodedByteCount") > 0
    assert first.get_by_role("button").get_attribute("aria-label").startswith("Pause yt_")
    box, along = first.locator(".time").bounding_box(), video.evaluate("v => v.currentTime / 3")
    at = (head.bounding_box()["x"] + 1 - box["x"]) / box["width"]
    assert along <= at + 0.05 and at <= video.evaluate("v => v.currentTime / 3") + 0.05

    second.click()
    opened.evaluate(MOVES, [second.locator(".head").element_handle(), 0])
    assert video.evaluate("v => v.paused") and not second.locator("video").evaluate("v => v.paused")
    opened.wait_for_function("document.querySelectorAll('.card.playing').length === 1")

    second.click()
    assert second.locator("video").evaluate("v => v.paused")
    opened.locator(".card.playing").wait_for(state="detached")


def test_by_keyboard_alone(opened: Any) -> None:
    opened.keyboard.press("Tab")
    for _ in range(5):
        if opened.evaluate("document.activeElement.matches('.play')"):
            break
        opened.keyboard.press("Tab")
    card = opened.locator(".card").first
    assert card.get_by_role("button").evaluate("b => b === document.activeElement")
    opened.keyboard.press("ArrowRight")
    opened.wait_for_function("document.querySelector('video').currentTime >= 1")
    opened.keyboard.press("Space")
    opened.evaluate(MOVES, [card.locator(".head").element_handle(), 1.0])
    opened.keyboard.press("Enter")
    assert card.locator("video").evaluate("v => v.paused")


def test_a_broken_clip_is_told_of_and_sounds(opened: Any) -> None:
    card = opened.locator(".card").nth(3)
    assert "Its mp4 cannot be decoded" in card.inner_text()
    card.get_by_role("button").click()
    opened.evaluate(MOVES, [card.locator(".head").element_handle(), 0])
    assert card.locator("video").evaluate("v => v.webkitAudioDecodedByteCount") > 0


SHAPES = [
    {"viewport": {"width": width, "height": 800}, "color_scheme": scheme}
    for width, scheme in ((320, "light"), (390, "dark"), (1600, "dark"))
]


@pytest.mark.parametrize("page", [("libx264", "flac")], indirect=True)
@pytest.mark.parametrize("opened", SHAPES, indirect=True, ids=lambda s: f"{s['viewport']['width']}-{s['color_scheme']}")
def test_every_width_and_colour(opened: Any) -> None:
    assert opened.evaluate("document.documentElement.scrollWidth <= innerWidth")
    light = opened.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number).every((c) => c > 128)")
    assert light == opened.evaluate("matchMedia('(prefers-color-scheme: light)').matches")
    assert opened.evaluate("[...document.images].every((i) => i.complete && i.naturalWidth > 0)")
    for word in (HOSTILE[0], HOSTILE[2]):
        assert opened.get_by_text(word, exact=True).count() >= 2
