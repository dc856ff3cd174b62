"""The page of a search in Chromium: query and hits play with sound, nothing overflows, nothing comes from outside."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from media import make_clip, tiny_profile
from test_browser_page import HOSTILE, MOVES, SHAPES, browser, opened  # noqa: F401  its fixtures serve here, too

from cmacc.shards.clip import Clip
from cmacc.shards.dataset import Dataset
from cmacc.shards.writer import DatasetWriter
from cmacc.train.search.gallery import Shown, gallery
from cmacc.train.search.page import write_search_page
from cmacc.train.search.query import Found


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Four clips of 3 s with labels of somebody who means ill; the last one's picture is broken."""
    folder = tmp_path_factory.mktemp("gallery")
    with DatasetWriter(folder / "set", tiny_profile()) as writer:
        for i in range(4):
            made = make_clip(i, labels=HOSTILE[: i + 1], split="train", seconds=3.0)
            writer.add(made if i < 3 else Clip(made.key, made.facts, {**made.members, "mp4": bytes(1000)}))
    return Dataset.open(folder / "set")


@pytest.fixture(scope="module")
def page(data: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    sound = data.read(0)["flac"]
    query = Shown(members={"flac": sound}, by="audio", name=f"{HOSTILE[1]}.flac")
    marks = ("own", "class", "other", "")
    hits = [Shown(i, by="video", cosine=0.9 - 0.4 * i, mark=mark) for i, mark in enumerate(marks)]  # type: ignore[arg-type]
    found = Found(query, hits, "audio", "video", HOSTILE[0], 7)
    yield write_search_page(data, found, tmp_path_factory.mktemp("pages") / "page.html")


def test_query_and_hits_play(opened: Any) -> None:  # noqa: F811
    """A sound without a picture, and a clip's own picture with its own sound."""
    cards = opened.locator(".card")
    assert cards.count() == 5
    for at in (0, 1):
        card = cards.nth(at)
        card.locator(".mel").click()
        opened.evaluate(MOVES, [card.locator(".head").element_handle(), 0])
        assert card.locator("video").evaluate("v => v.webkitAudioDecodedByteCount") > 0
    assert cards.nth(1).locator("video").evaluate("v => v.videoWidth") == 48
    opened.wait_for_function("document.querySelectorAll('.card.playing').length === 1")
    assert "asked" in cards.nth(0).get_attribute("class") and "query" in cards.nth(0).inner_text()


def test_what_is_said_of_each(opened: Any) -> None:  # noqa: F811
    said = [card.inner_text() for card in opened.locator(".card").all()]
    assert HOSTILE[1] in said[0] and "by its sound" in said[0]
    for rank, (text, mark) in enumerate(zip(said[1:], ("its own", "same label", "another label", ""), strict=True), start=1):
        assert mark in text and f"{rank}\n" in text.replace(" ", "\n") and "by its picture" in text
    assert "cosine 0.900" in said[1] and "cosine −0.300" in said[4]
    assert "Its mp4 cannot be decoded" in said[4]
    assert "7 clips without an embedding" in opened.locator("header").inner_text()


@pytest.mark.parametrize("opened", SHAPES, indirect=True, ids=lambda s: f"{s['viewport']['width']}-{s['color_scheme']}")
def test_every_width_and_colour(opened: Any) -> None:  # noqa: F811
    assert opened.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert opened.evaluate("[...document.querySelectorAll('.card')].every((c) => c.scrollWidth <= c.clientWidth)")
    assert opened.evaluate("[...document.images].every((i) => i.complete && i.naturalWidth > 0)")
    assert opened.get_by_text(HOSTILE[0], exact=True).count() >= 4


def test_a_clip_that_is_asked_for_twice_is_read_once(data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    ranges = Dataset.ranges
    monkeypatch.setattr(Dataset, "ranges", lambda self, spans: (asked.append(len(spans)), ranges(self, spans))[1])
    text = gallery(data, [(Shown(0), [Shown(0), Shown(1)]), (Shown(1), [])])
    assert len(asked) == 2 and text.count("<article") == 4 and "no clip was found" in text
    assert "<script" not in text
    with pytest.raises(ValueError, match="has either a row or members; give one of them"):
        Shown()
