"""One clip before encoding: draws its latents, its picture (YUV 4:2:0) and its sound, and trims both to size targets.

Everything a shortcut could use is drawn independently of the class and of the other stream: mean colour, sound level of every
quarter, and the encoded sizes. The sizes are met by trial: static texture sets the bytes of keyframes, moving grain those
of the other frames, hiss those of the sound.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cmacc.ingest.world import codec
from cmacc.ingest.world.sound import Wave, in_room, level, quarter_db, tilted_noise
from cmacc.ingest.world.things import THINGS, Cue, Ink, Sheet

Frames = NDArray[np.uint8]
Amounts = NDArray[np.float64]
RATE_HZ = (1.5, 3.0)
SIZE = (0.5, 0.8)
LEAD_S = 1.2
EFFORTS = (0.25, 0.5, 1.0)


@dataclass(frozen=True)
class Scene:
    """frames: (T, 3H/2, W) uint8, planes Y, U, V as in yuv420p. sound: (S,) float32, 16 kHz. latents: for analysis alone."""

    frames: Frames
    sound: Wave
    latents: dict[str, Any]


def make_scene(label: str, rng: np.random.Generator, seconds: float, width: int, height: int, fps: int) -> Scene:
    """A clip of class `label`; every random choice comes from `rng`."""
    shared, seen, heard = rng.spawn(3)
    cue, rate = draw_cue(shared, seconds)
    frames, look = _picture(label, cue, seen, seconds, width, height, fps)
    sound, tone = _sound(label, cue, heard)
    events = [round(float(b), 4) for b in cue.beats if 0 <= b < seconds]
    latents = {"rate_hz": round(rate, 4), "size": cue.size, "pitch": cue.pitch, "events_s": events, **look, **tone}
    return Scene(frames, sound, latents)


def draw_cue(rng: np.random.Generator, seconds: float) -> tuple[Cue, float]:
    """The shared latents and the event rate in Hz: uneven beats, a size, a pitch that follows the size."""
    rate = float(np.exp(rng.uniform(*np.log(RATE_HZ))))
    gaps = rng.uniform(0.8, 1.2, int((seconds + 5) * rate) + 4) / rate
    beats = np.cumsum(gaps) - 2.2 - rng.uniform(0, 1 / rate)
    size = float(np.exp(rng.uniform(*np.log(SIZE))))
    pitch = (0.63 / size) ** 1.2 * 2 ** rng.normal(0, 0.06)
    return Cue(beats.astype(np.float32), round(float(pitch), 4), round(size, 4), seconds), rate


def _backdrop(rng: np.random.Generator, width: int, height: int) -> Ink:
    """A still background: a slanted ramp with a few soft blobs, (H, W) in luma steps, mean near 0."""
    x, y = np.linspace(-1, 1, width)[None, :], np.linspace(-1, 1, height)[:, None]
    out = x * rng.uniform(-14, 14) + y * rng.uniform(-14, 14)
    for _ in range(4):
        radius = rng.uniform(0.1, 0.5)
        away = ((x - rng.uniform(-1, 1)) ** 2 * (width / height) ** 2 + (y - rng.uniform(-1, 1)) ** 2) / radius**2
        out = out + rng.uniform(-24, 24) * np.exp(-(away**2))
    return np.asarray(out - out.mean(), np.float32)


def _grain(rng: np.random.Generator, shape: tuple[int, ...]) -> Ink:
    """Moving grain of RMS 1, (T, H, W), of a random coarseness, so that its share of the bytes does not show in re-encoding."""
    grain = rng.standard_normal(shape, np.float32)
    blend = np.float32(rng.uniform(-0.6, 1))
    for axis in (1, 2):
        grain = grain + blend * np.roll(grain, 1, axis)
    return grain / (1 + blend * blend)


def _ink(label: str, cue: Cue, rng: np.random.Generator, at: Wave, width: int, height: int) -> tuple[Ink, dict[str, Any]]:
    """Ink of the thing on the whole frame, (T, H, W), and where it stands."""
    half = cue.size / 2 * height
    reach = 1.15 * half
    x = rng.uniform(reach, width - reach)
    y = rng.uniform(reach, height - reach)
    tilt, mirror = rng.uniform(-0.15, 0.15), -1 if rng.random() < 0.5 else 1
    left, right = max(int(x - reach), 0), min(int(x + reach) + 1, width)
    top, bottom = max(int(y - reach), 0), min(int(y + reach) + 1, height)
    dx = ((np.arange(left, right) + 0.5 - x) / half)[None, None, :]
    dy = ((np.arange(top, bottom) + 0.5 - y) / half)[None, :, None]
    u, v = mirror * (dx * np.cos(tilt) + dy * np.sin(tilt)), dy * np.cos(tilt) - dx * np.sin(tilt)
    ink = np.zeros((len(at), height, width), np.float32)
    ink[:, top:bottom, left:right] = THINGS[label].draw(cue, Sheet(u.astype(np.float32), v.astype(np.float32), 1 / half, at))
    return ink, {"x": round(float(x / width), 4), "y": round(float(y / height), 4), "mirrored": mirror < 0}


def _picture(
    label: str, cue: Cue, rng: np.random.Generator, seconds: float, width: int, height: int, fps: int
) -> tuple[Frames, dict[str, Any]]:
    at = ((np.arange(round(seconds * fps)) + 0.5) / fps).astype(np.float32)
    ink, look = _ink(label, cue, rng, at, width, height)
    means = np.array([rng.uniform(100, 155), rng.uniform(100, 156), rng.uniform(100, 156)])
    contrast = rng.uniform(40, 72) * rng.choice([-1, 1])
    tints = rng.uniform(-28, 28, 2)
    base: Ink = _backdrop(rng, width, height) + np.float32(contrast) * ink
    small = ink[:, ::2, ::2]
    planes = [np.clip(means[1 + k] + tints[k] * (small - small.mean()), 0, 255) for k in (0, 1)]
    chroma = np.stack(planes, 1).round().astype(np.uint8).reshape(len(at), height // 2, width)
    texture = rng.standard_normal((height, width), np.float32)
    grain = _grain(rng, base.shape)
    base += np.float32(means[0]) - base.mean()

    def develop(amounts: Amounts, count: int) -> Frames:
        luma = base[:count] + np.float32(amounts[0]) * texture + np.float32(amounts[1]) * grain[:count]
        return np.concatenate([np.clip(luma + 0.5, 0, 255).astype(np.uint8), chroma[:count]], 1)

    def sizes(amounts: Amounts, effort: float) -> Amounts:
        return codec.trial_video(develop(amounts, max(round(effort * len(at)), 4)), fps) * (19_200 / (width * height))

    limits = np.array([[0.3, 24.0], [0.3, 12.0]])
    amounts = solve(sizes, draw_video_target(rng), np.array([7.5, 3.3]), np.array([1.6, 0.5]), limits)
    tried = {"texture_sd": round(float(amounts[0]), 3), "grain_sd": round(float(amounts[1]), 3)}
    return develop(amounts, len(at)), {**look, "contrast": round(float(contrast), 2), **tried}


def solve(
    sizes: Callable[[Amounts, float], Amounts], target: Amounts, start: Amounts, power: Amounts, limits: Amounts
) -> Amounts:
    """Amounts (n,) within limits (n, 2) that meet the target sizes (n,): secant steps in logarithms, one knob a size.

    sizes(amounts, effort): measured, on a share `effort` of the clip. power: how the amount moves with the size, first guess.
    """
    amounts = start
    before: tuple[Amounts, Amounts] | None = None
    for effort in EFFORTS:
        got = sizes(amounts, effort)
        if before is not None:
            step, gain = np.log(amounts / before[0]), np.log(got / before[1])
            known = np.abs(gain) > 0.03
            power = np.where(known, np.clip(step / np.where(known, gain, 1), power / 2, power * 2), power)
        before = amounts, got
        amounts = np.clip(amounts * (target / got) ** power, limits[:, 0], limits[:, 1])
    return amounts


def draw_video_target(rng: np.random.Generator) -> Amounts:
    """Mean bytes of a keyframe and of another frame, at 160x120, (2,)."""
    return np.exp([rng.uniform(np.log(4200), np.log(8200)), rng.uniform(np.log(560), np.log(2000))])


def _sound(label: str, cue: Cue, rng: np.random.Generator) -> tuple[Wave, dict[str, Any]]:
    clean = in_room(THINGS[label].sing(cue.earlier(LEAD_S), rng), rng, LEAD_S)
    loud = rng.uniform(-30, -20)
    target_db = loud + rng.normal(0, 1.2, 4)
    bits = loud / 6.02 + rng.uniform(13.0, 14.0)
    hiss = tilted_noise(rng, len(clean), rng.uniform(-3, 0))

    def mix(weight: Amounts) -> Wave:
        return level(clean + np.float32(weight[0]) * hiss, target_db)

    def size(weight: Amounts, effort: float) -> Amounts:
        return np.array([2.0 ** (codec.trial_audio(mix(weight)) * 8 / len(clean))])

    weight = solve(size, np.array([2.0**bits]), np.array([0.04]), np.array([1.0]), np.array([[0.005, 0.5]]))
    sound = mix(weight)
    return sound, {"level_db": round(float(quarter_db(sound).mean()), 2), "hiss": round(float(weight[0]), 4)}
