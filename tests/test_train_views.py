"""Views: pure functions of (seed, epoch, key), inside the clip, and spread as the options say."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy.stats import chisquare, kstest

from cmacc.train.loading.views import ClipShape, View, ViewConfig, central_view, generator, training_views

CONFIG = ViewConfig(frames=4, view_s=0.5)
CLIP = ClipShape("clip", 30, 16.0, 1536, 1024)
ALL = ViewConfig(frames=4, view_s=0.5, blur=0.5, masks=2, offset_s=0.3, second="apart")


def drawn(config: ViewConfig = CONFIG, clip: ClipShape = CLIP, count: int = 2000) -> list[tuple[View, ...]]:
    """The views of `count` clips that differ in their keys alone."""
    return [training_views(config, 3, 1, clip._replace(key=f"clip_{i}")) for i in range(count)]


def firsts(config: ViewConfig = CONFIG, clip: ClipShape = CLIP, count: int = 2000) -> list[View]:
    return [views[0] for views in drawn(config, clip, count)]


def test_a_pure_function_of_seed_epoch_and_key() -> None:
    np.random.seed(0)
    first = drawn(ALL, count=20)
    np.random.seed(1)
    assert drawn(ALL, count=20)[::-1] == first[::-1]
    words = ((3, 1, "clip_0"), (4, 1, "clip_0"), (3, 2, "clip_0"), (3, 1, "b"))
    others = {training_views(ALL, seed, epoch, CLIP._replace(key=key)) for seed, epoch, key in words}
    assert len(others) == 4
    assert first[0] in others
    assert all(one != other for one, other in first)


def test_words_do_not_run_together() -> None:
    assert len({generator(*words).integers(2**62) for words in ((1, 23, "a"), (12, 3, "a"), (1, 2, "3a"), (1, "23a"))}) == 4


@pytest.mark.parametrize(
    ("change", "fields"),
    [({"crop_area": 0.8}, {"crop"}), ({"crop_ratio": 1.0}, {"crop"}), ({"flip": 1.0}, {"mirror"}),
     ({"grey": 1.0}, {"saturation"}), ({"jitter": 0.1}, {"brightness", "contrast", "saturation"}),
     ({"blur": 0.0}, {"blur_sigma"}), ({"blur_sigma": 9.0}, {"blur_sigma"}), ({"gain_db": 1.0}, {"gain"}),
     ({"masks": 0}, {"masks"}), ({"mask_bands": 0}, {"masks"}), ({"offset_s": 0.0}, {"sound_s"}),
     ({"second": "same"}, {"start_frame", "sound_s"}),
     ({"view_s": 0.25}, {"start_frame", "sound_s", "masks"})],
    ids=lambda value: ",".join(sorted(value)),
)  # fmt: skip
def test_one_option_changes_nothing_else(change: dict[str, Any], fields: set[str]) -> None:
    before, after = drawn(ALL, count=50), drawn(replace(ALL, **change), count=50)
    changed = {
        name
        for olds, news in zip(before, after, strict=True)
        for old, new in zip(olds, news, strict=True)
        for name in vars(old)
        if getattr(old, name) != getattr(new, name)
    }
    assert changed == fields


@pytest.mark.parametrize(("width", "height"), [(1920, 1080), (1080, 1920), (1000, 1000), (4000, 1000)])
@pytest.mark.parametrize("ratio", [1.0, 4 / 3, 2.0])
def test_area_and_ratio_of_crops(width: int, height: int, ratio: float) -> None:
    config = replace(CONFIG, crop_ratio=ratio)
    crops = np.array([v.crop for v in firsts(config, CLIP._replace(width=width, height=height))])
    areas, ratios = crops[:, 2] * crops[:, 3] / min(width, height) ** 2, crops[:, 3] / crops[:, 2]
    assert kstest(areas, "uniform", (0.4, 0.6)).pvalue > 1e-3
    assert 1 / ratio - 0.01 < ratios.min() <= ratios.max() < ratio + 0.01
    # Every ratio fits once the area is below 1 / ratio of the largest square; then none is preferred.
    free = np.log(ratios[areas < 0.95 / ratio])
    assert ratio == 1 or kstest(free, "uniform", (-math.log(ratio), 2 * math.log(ratio))).pvalue > 1e-3


@pytest.mark.parametrize(
    ("width", "height", "least"),
    [(455, 257, 16), (456, 256, 16), (20, 300, 16), (17, 16, 16), (12, 400, 12), (9, 5, 4), (3, 2, 2), (1, 1, 2), (0, 0, 2)],
)
def test_crops_are_even_and_inside(width: int, height: int, least: int) -> None:
    config = replace(CONFIG, crop_area=0.002)
    clip = CLIP._replace(width=width, height=height)
    crops = np.array([v.crop for v in [*firsts(config, clip, 500), central_view(config, clip)]])
    assert (crops % 2 == 0).all()
    assert (crops >= 0).all()
    assert (crops[:, 0] + crops[:, 2]).max() == max(2, height // 2 * 2)  # even, and touching the last even line
    assert (crops[:, 1] + crops[:, 3]).max() == max(2, width // 2 * 2)
    assert crops[:, 2:].min() == least


def test_where_crops_lie() -> None:
    config = replace(CONFIG, crop_area=0.25, crop_ratio=1.0)
    tops, lefts, tall, wide = np.array([v.crop for v in firsts(config)]).T
    for start, room in ((tops, 1024 - tall), (lefts, 1536 - wide)):
        free = room > 200
        assert kstest(start[free] / room[free], "uniform").pvalue > 1e-3


def test_options_are_met() -> None:
    config = ViewConfig(frames=4, view_s=0.5, flip=0.25, grey=0.2, jitter=0.3, gain_db=6.0, blur=0.3, blur_sigma=2.0)
    views = firsts(config)
    mirrored, grey, blurred = (
        sum(hits) for hits in zip(*((v.mirror, v.saturation == 0, v.blur_sigma > 0) for v in views), strict=True)
    )
    for hits, share in ((mirrored, 0.25), (grey, 0.2), (blurred, 0.3)):
        assert chisquare([hits, 2000 - hits], [2000 * share, 2000 * (1 - share)]).pvalue > 1e-3
    assert kstest([20 * math.log10(v.gain) for v in views], "uniform", (-6, 12)).pvalue > 1e-3
    assert kstest([v.blur_sigma for v in views if v.blur_sigma], "uniform", (0.1, 1.9)).pvalue > 1e-3
    for factors in ([v.brightness for v in views], [v.contrast for v in views], [v.saturation for v in views if v.saturation]):
        assert kstest(factors, "uniform", (0.7, 0.6)).pvalue > 1e-3
    starts = [v.start_frame for v in views]
    assert set(starts) == set(range(30 - 8 + 1))
    assert chisquare(np.bincount(starts)).pvalue > 1e-3
    assert all(v.sound_s == v.start_frame / 16 for v in views)


def test_draws_are_independent() -> None:
    config = replace(ALL, second="none", grey=0.0, blur=1.0, masks=1, crop_area=0.25)
    clip = CLIP._replace(n_frames=200)
    rows = np.array([
        (v.start_frame, v.sound_s - v.start_frame / 16, v.crop[2] * v.crop[3], v.crop[3] / v.crop[2],
         v.crop[0] / (1026 - v.crop[2]), v.crop[1] / (1538 - v.crop[3]), v.mirror, v.brightness, v.contrast, v.saturation,
         v.blur_sigma, v.gain, v.masks[0][2], v.masks[1][3])
        for v in firsts(config, clip)
    ])  # fmt: skip
    free = rows[rows[:, 2] < 0.7 * 1024**2]  # larger crops do not fit in every shape
    between = np.corrcoef(free.T) - np.eye(rows.shape[1])
    assert np.abs(between).max() < 0.1


def test_no_augmentation_when_the_options_say_so() -> None:
    config = ViewConfig(crop_area=1.0, crop_ratio=1.0, flip=0.0, grey=0.0, jitter=0.0, gain_db=0.0)
    for view in firsts(config, ClipShape("clip", 30, 16.0, 64, 64), 20):
        assert view == View(view.start_frame, (0, 0, 64, 64), view.start_frame / 16)


def test_masks() -> None:
    config = replace(CONFIG, masks=2, mask_bands=12, mask_steps=200, n_mels=40, mel_high_hz=4000.0)
    masks = np.array([v.masks for v in firsts(config)])
    assert masks.shape == (2000, 4, 4)
    assert config.mel_steps == 51
    over_bands, over_steps = masks[:, ::2].reshape(-1, 4), masks[:, 1::2].reshape(-1, 4)
    for first, size, widest, whole in ((*over_bands.T[[0, 2]], 12, 40), (*over_steps.T[[1, 3]], 51, 51)):
        assert chisquare(np.bincount(size, minlength=widest + 1)[1:]).pvalue > 1e-3
        assert size.min() == 1
        assert first.min() == 0
        assert (first + size).max() == whole
        assert chisquare(np.bincount(first[size == 1], minlength=whole)).pvalue > 1e-3
    assert (over_bands[:, [1, 3]] == [0, 51]).all()
    assert (over_steps[:, [0, 2]] == [0, 40]).all()


def test_offsets() -> None:
    """Uniform either way, kept inside the sound."""
    views = firsts(replace(CONFIG, offset_s=0.25), CLIP._replace(n_frames=160), 4000)
    shifts = np.array([v.sound_s - v.start_frame / 16 for v in views])
    middle = np.array([4 <= v.start_frame <= 160 - 8 - 4 for v in views])
    assert kstest(shifts[middle], "uniform", (-0.25, 0.5)).pvalue > 1e-3
    sounds = [v.sound_s for v in views]
    assert min(sounds) == 0.0
    assert max(sounds) == 10.0 - 0.5
    assert {v.sound_s for v in firsts(replace(CONFIG, offset_s=0.25), CLIP._replace(n_frames=5), 20)} == {0.0}


def test_a_second_view_of_the_same_instants() -> None:
    pairs = drawn(replace(CONFIG, second="same"), count=200)
    assert [one for one, _ in pairs] == firsts(count=200)
    for one, other in pairs:
        assert (one.start_frame, one.sound_s) == (other.start_frame, other.sound_s)
        assert one.crop != other.crop
        assert one.gain != other.gain


@pytest.mark.parametrize("n_frames", [38, 408])
def test_a_second_view_some_way_off(n_frames: int) -> None:
    """Distances of 0, 1, ... m frames have probabilities 2 m + 1, 2 m - 1, ... 1 over (m + 1)^2; both orders, any place."""
    pairs = drawn(replace(CONFIG, second="apart"), CLIP._replace(n_frames=n_frames), 6000)
    starts = np.array([[v.start_frame for v in pair] for pair in pairs])
    distances, early, last = np.abs(starts[:, 0] - starts[:, 1]), starts.min(axis=1), n_frames - 8
    assert starts.max() <= last
    law = (2 * np.arange(last, -1, -1) + 1) / (last + 1) ** 2
    bins = np.arange(last + 1) * 25 // (last + 1)
    assert chisquare(np.bincount(bins[distances]), np.bincount(bins, 6000 * law)).pvalue > 1e-3
    forward = int((starts[:, 0] < starts[:, 1]).sum())
    assert chisquare([forward, (distances > 0).sum() - forward]).pvalue > 1e-3
    places = (early + generator("between").random(6000)) / (last - distances + 1)
    assert kstest(places, "uniform").pvalue > 1e-3


def test_views_of_a_clip_too_short_for_two() -> None:
    for one, other in drawn(replace(CONFIG, second="apart"), CLIP._replace(n_frames=6), 10):
        assert (one.start_frame, other.start_frame, one.sound_s, other.sound_s) == (0, 0, 0.0, 0.0)


@pytest.mark.parametrize(("n_frames", "starts"), [(8, (0, 0, 0)), (3, (0, 0, 0)), (9, (0, 0, 1)), (28, (0, 10, 20))])
def test_central_view(n_frames: int, starts: tuple[int, ...]) -> None:
    """Eight frames a view. A shorter clip starts at its first frame."""
    for place, start in zip((0.0, 0.5, 1.0), starts, strict=True):
        assert central_view(CONFIG, ClipShape("a", n_frames, 16.0, 64, 32), place) == View(start, (0, 16, 32, 32), start / 16)


@pytest.mark.parametrize(
    ("width", "height", "crop"),
    [(32, 64, (16, 0, 32, 32)), (455, 256, (0, 98, 256, 256)), (257, 455, (98, 0, 256, 256)), (34, 32, (0, 0, 32, 32))],
)
def test_the_central_square(width: int, height: int, crop: tuple[int, ...]) -> None:
    assert central_view(CONFIG, ClipShape("a", 30, 16.0, width, height)).crop == crop


def test_a_sound_without_pictures() -> None:
    alone = ClipShape("a", 0, 0.0, 0, 0)
    assert [(v.start_frame, v.sound_s) for v in (*training_views(ALL, 0, 0, alone), central_view(ALL, alone))] == [(0, 0.0)] * 3


@pytest.mark.parametrize(
    ("frames", "view_s", "fps", "numbers", "span"),
    [(4, 0.5, 8.0, [0, 1, 2, 3], 4), (4, 0.5, 25.0, [0, 3, 6, 9], 13), (5, 1.0, 30.0, [0, 6, 12, 18, 24], 30),
     (4, 1.0, 3.0, [0, 0, 1, 2], 3), (3, 0.1, 5.0, [0, 0, 0], 1), (3, 0.3, 10.0, [0, 1, 2], 3),
     (6, 0.3, 8.0, [0, 0, 0, 1, 1, 2], 3), (6, 0.7, 12.0, [0, 1, 2, 4, 5, 7], 9),
     (10, 0.7, 10.0, [0, 0, 1, 2, 2, 3, 4, 4, 5, 6], 7), (4, 1.0, 30000 / 1001, [0, 7, 14, 22], 30)],
)  # fmt: skip
def test_frame_numbers(frames: int, view_s: float, fps: float, numbers: list[int], span: int) -> None:
    config = ViewConfig(frames=frames, view_s=view_s)
    for start in (0, 1000):
        assert (config.frame_numbers(start, fps) - start).tolist() == numbers
    assert config.frame_numbers(0, fps).dtype == np.int64
    assert config.span_frames(fps) == span


@pytest.mark.parametrize("fps", [5.0, 8.0, 12.5, 24000 / 1001, 25.0, 30.0, 60.0])
def test_a_view_lasts_view_s_at_any_frame_rate(fps: float) -> None:
    for config in (ViewConfig(frames=f, view_s=s / 10) for f in (1, 7, 16, 32) for s in range(1, 30)):
        numbers, span = config.frame_numbers(3, fps), config.span_frames(fps)
        instants = np.arange(config.frames) * config.view_s / config.frames
        assert (numbers[0], numbers[-1] < 3 + span) == (3, True)
        assert ((numbers - 3) / fps <= instants + 1e-9).all()
        assert ((numbers - 3 + 1) / fps > instants - 1e-9).all()
        assert (span - 1) / fps < config.view_s <= span / fps + 1e-9


@pytest.mark.parametrize(
    ("view_s", "rate", "hop", "steps"),
    [(1.0, 16_000, 160, 101), (0.5, 8000, 128, 32), (0.7, 16_000, 160, 71), (0.001, 8000, 160, 1)],
)
def test_mel_steps(view_s: float, rate: int, hop: int, steps: int) -> None:
    assert ViewConfig(view_s=view_s, audio_rate=rate, hop=hop, mel_high_hz=4000.0).mel_steps == steps


@pytest.mark.parametrize(
    "wrong",
    [{"frames": 0}, {"size": -1}, {"view_s": 0.0}, {"view_s": math.nan}, {"view_s": math.inf}, {"mel_high_hz": 9000.0},
     {"mel_low_hz": 8000.0}, {"mel_low_hz": -1.0}, {"mel_std_db": 0.0}, {"crop_area": 0.0}, {"crop_area": 1.5}, {"hop": 0},
     {"flip": 1.5}, {"grey": -0.1}, {"jitter": 1.5}, {"gain_db": -1.0}, {"gain_db": math.inf}, {"window": 0}, {"window": 513},
     {"crop_ratio": 0.9}, {"crop_ratio": math.nan}, {"blur": 2.0}, {"blur_sigma": 0.0}, {"masks": -1}, {"mask_bands": -1},
     {"mask_steps": -1}, {"offset_s": -0.5}, {"offset_s": math.nan}, {"second": "other"}],
)  # fmt: skip
def test_a_wrong_option_is_named(wrong: dict[str, float]) -> None:
    (name,) = wrong
    with pytest.raises(ValueError, match=rf"^view\.{name} is .*; give "):
        ViewConfig(**wrong)  # type: ignore[arg-type]
