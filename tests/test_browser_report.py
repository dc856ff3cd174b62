"""The page of a run in Chromium: on a phone and wide, in the light and in the dark; its clips play, and it asks nobody."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_browser_page import MOVES, browser  # noqa: F401  a fixture
from train_data import TINY, clips, write_dataset

from cmacc.train.config import change
from cmacc.train.pretrain import pretrain
from cmacc.train.report.page import write_report


@pytest.fixture(scope="module")
def page(browser: Any, on_a_cpu: None, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    folder = tmp_path_factory.mktemp("report")
    pretrain(write_dataset(folder / "data", clips()).url, folder / "run", change(TINY, {"steps": 4, "eval_every": 2}))
    return write_report(folder / "run", examples=1)


@pytest.fixture
def opened(browser: Any, page: Path, request: pytest.FixtureRequest) -> Iterator[Any]:  # noqa: F811
    """It must say nothing on the console, ask nothing of a network, pop nothing up."""
    context = browser.new_context(**getattr(request, "param", {"viewport": {"width": 1200, "height": 800}}))
    window, said = context.new_page(), []
    window.on("console", lambda message: said.append(message.text))
    window.on("pageerror", lambda error: said.append(str(error)))
    window.on("request", lambda asked: said.append(asked.url) if not asked.url.startswith(("file:", "data:")) else None)
    window.goto(page.as_uri())
    yield window
    context.close()
    assert said == []


SHAPES = [
    {"viewport": {"width": width, "height": 800}, "color_scheme": scheme}
    for width, scheme in ((320, "dark"), (390, "light"), (1200, "dark"))
]


@pytest.mark.parametrize("opened", SHAPES, indirect=True, ids=lambda s: f"{s['viewport']['width']}-{s['color_scheme']}")
def test_every_width_and_colour(opened: Any) -> None:
    """Nothing is wider than the window; each curve has a colour that stands out, and fills its figure."""
    assert opened.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert opened.evaluate("[...document.images].every((i) => i.complete && i.naturalWidth > 0)")
    width = opened.viewport_size["width"]
    for svg in opened.locator(".curves figure > svg").all():
        box = svg.bounding_box()
        assert box["width"] > min(250, 0.7 * width) and box["height"] > 120
    light = opened.evaluate("matchMedia('(prefers-color-scheme: light)').matches")
    stroke = "getComputedStyle(document.querySelector('.curves path.s1')).stroke.match(/\\d+/g).map(Number)"
    assert (sum(opened.evaluate(stroke)) < 384) == light


def test_folded_parts_open_and_clips_play(opened: Any) -> None:
    options = opened.get_by_text("All ", exact=False).filter(has_text="options")
    options.click()
    assert opened.get_by_text("objective.pseudo_tau", exact=True).is_visible()
    card = opened.locator(".card.plays").first
    card.get_by_role("button").click()
    opened.evaluate(MOVES, [card.locator(".head").element_handle(), 0])
    assert card.locator("video").evaluate("v => v.videoWidth") > 0


def test_the_pointer_tells_numbers(opened: Any) -> None:
    band = opened.locator(".curves .band").first
    band.hover()
    assert "picture → sound" in band.locator("title").text_content()
    opened.wait_for_function("document.querySelector('.curves .band:hover') !== null")
