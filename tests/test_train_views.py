"""Views: pure functions of (seed, epoch, key), inside the picture, square, and spread as the options say."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import chisquare, kstest

from cmacc.train.views import View, ViewConfig, central_view, generator, training_view

CONFIG = ViewConfig(frames=4, view_s=0.5)


def views(
    count: int = 400, config: ViewConfig = CONFIG, n_frames: int = 30, fps: float = 16.0, aspect: float = 1.5
) -> list[View]:
    return [training_view(config, 3, 1, f"clip_{i}", n_frames, fps, aspect) for i in range(count)]


def test_a_pure_function_of_seed_epoch_and_key() -> None:
    np.random.seed(0)
    first = views(20)
    np.random.seed(1)
    assert views(20)[::-1] == first[::-1]
    others = {
        training_view(CONFIG, *words, 30, 16.0, 1.5)
        for words in ((3, 1, "clip_0"), (4, 1, "clip_0"), (3, 2, "clip_0"), (3, 1, "b"))
    }
    assert len(others) == 4
    assert first[0] in others


def test_words_do_not_run_together() -> None:
    assert len({generator(*words).integers(2**62) for words in ((1, 23, "a"), (12, 3, "a"), (1, 2, "3a"), (1, "23a"))}) == 4


@pytest.mark.parametrize("aspect", [0.5, 1.0, 16 / 9])
def test_crops_are_square_and_inside(aspect: float) -> None:
    areas = []
    for view in views(aspect=aspect):
        top, left, height, width = view.crop
        assert 0 <= top <= top + height <= 1 + 1e-12
        assert 0 <= left <= left + width <= 1 + 1e-12
        assert height == pytest.approx(width * aspect)  # in units of the picture's height
        areas.append((height * width * aspect) / min(1.0, aspect) ** 2)  # of the largest square
    assert min(areas) >= CONFIG.crop_area - 1e-12
    assert kstest(areas, "uniform", (CONFIG.crop_area, 1 - CONFIG.crop_area)).pvalue > 1e-3


def test_options_are_met() -> None:
    config = ViewConfig(frames=4, view_s=0.5, flip=0.25, grey=0.2, jitter=0.3, gain_db=6.0)
    drawn = views(2000, config)
    mirrored, grey = (sum(hits) for hits in ((v.mirror for v in drawn), (v.saturation == 0 for v in drawn)))
    assert chisquare([mirrored, 2000 - mirrored], [500, 1500]).pvalue > 1e-3
    assert chisquare([grey, 2000 - grey], [400, 1600]).pvalue > 1e-3
    assert kstest([20 * math.log10(v.gain) for v in drawn], "uniform", (-6, 12)).pvalue > 1e-3
    for factors in ([v.brightness for v in drawn], [v.contrast for v in drawn], [v.saturation for v in drawn if v.saturation]):
        assert kstest(factors, "uniform", (0.7, 0.6)).pvalue > 1e-3
    starts = [v.start_frame for v in drawn]
    assert set(starts) == set(range(30 - 4 * 2 + 1))
    assert chisquare(np.bincount(starts)).pvalue > 1e-3


def test_no_augmentation_when_the_options_say_so() -> None:
    config = ViewConfig(crop_area=1.0, flip=0.0, grey=0.0, jitter=0.0, gain_db=0.0)
    for view in views(20, config, aspect=1.0):
        assert view == View(view.start_frame, (0.0, 0.0, 1.0, 1.0))


@pytest.mark.parametrize(("n_frames", "starts"), [(8, (0, 0, 0)), (3, (0, 0, 0)), (9, (0, 0, 1)), (28, (0, 10, 20))])
def test_central_view(n_frames: int, starts: tuple[int, ...]) -> None:
    """Stride 2: eight frames a view. A shorter clip starts at its first frame."""
    for place, start in zip((0.0, 0.5, 1.0), starts, strict=True):
        assert central_view(CONFIG, n_frames, 16.0, 2.0, place) == View(start, (0.0, 0.25, 1.0, 0.5))
    assert central_view(CONFIG, n_frames, 16.0, 0.5).crop == (0.25, 0.0, 0.5, 1.0)


@pytest.mark.parametrize(
    ("frames", "view_s", "fps", "stride"), [(16, 1.0, 25.0, 2), (8, 1.5, 16.0, 3), (4, 0.5, 8.0, 1), (32, 0.1, 25.0, 1)]
)
def test_spans(frames: int, view_s: float, fps: float, stride: int) -> None:
    config = ViewConfig(frames=frames, view_s=view_s)
    assert config.stride(fps) == stride
    assert config.span_s(fps) == pytest.approx(frames * stride / fps)


@pytest.mark.parametrize(
    "wrong",
    [{"frames": 0}, {"size": -1}, {"view_s": 0.0}, {"view_s": math.nan}, {"view_s": math.inf}, {"mel_high_hz": 9000.0},
     {"mel_low_hz": 8000.0}, {"mel_low_hz": -1.0}, {"mel_std_db": 0.0}, {"crop_area": 0.0}, {"crop_area": 1.5}, {"hop": 0},
     {"flip": 1.5}, {"grey": -0.1}, {"jitter": 1.5}, {"gain_db": -1.0}, {"gain_db": math.inf}],
)  # fmt: skip
def test_a_wrong_option_is_named(wrong: dict[str, float]) -> None:
    (name,) = wrong
    with pytest.raises(ValueError, match=rf"^view\.{name} is .*; give "):
        ViewConfig(**wrong)  # type: ignore[arg-type]
