"""The classes: how each thing looks, moves and sounds. Picture and sound share one `Cue`.

A drawing is ink, (T, h, w) float32 in 0..1, on a `Sheet` whose coordinates run over -1..1 across the thing (u right, v down).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from cmacc.ingest.world.sound import Wave, attack, band_noise, clock, decay, glide, partials, strike

Ink = NDArray[np.float32]


@dataclass(frozen=True)
class Cue:
    """What picture and sound share. Equal in distribution for all classes, so that no latent tells the class.

    beats: (B,) seconds, event times, from before the clip to after it. pitch: frequency factor, larger for a smaller thing.
    size: height of the thing in frame heights. seconds: length of the clip.
    """

    beats: Wave
    pitch: float
    size: float
    seconds: float

    def earlier(self, lead_s: float) -> Cue:
        """The same events heard from `lead_s` seconds before the clip."""
        return replace(self, beats=self.beats + np.float32(lead_s), seconds=self.seconds + lead_s)

    def phase(self, at: Wave) -> Wave:
        """Beats passed at each instant: k at event k, linear between."""
        return np.interp(at, self.beats, np.arange(len(self.beats))).astype(np.float32)

    def since(self, at: Wave) -> Wave:
        """Seconds since the latest event."""
        number = np.searchsorted(self.beats, at + 1e-6, side="right") - 1
        return (at - self.beats[np.maximum(number, 0)]).astype(np.float32)


@dataclass(frozen=True)
class Sheet:
    """Where to draw. u, v: (1, h, w) coordinates in things' units; pixel: one pixel in those units; at: (T,) frame instants."""

    u: Ink
    v: Ink
    pixel: float
    at: Wave

    def fill(self, distance: Ink) -> Ink:
        """Ink from a signed distance (negative inside), with an edge three pixels soft."""
        return np.clip(0.5 - distance / np.float32(3 * self.pixel), 0, 1)

    def disc(self, u: Ink | float, v: Ink | float, radius: Ink | float) -> Ink:
        return self.fill(np.hypot(self.u - u, self.v - v) - radius)

    def box(self, u: Ink | float, v: Ink | float, half_u: Ink | float, half_v: Ink | float) -> Ink:
        return self.fill(np.maximum(np.abs(self.u - u) - half_u, np.abs(self.v - v) - half_v))

    def bar(self, u0: Ink | float, v0: Ink | float, u1: Ink | float, v1: Ink | float, half: float) -> Ink:
        """A line with round ends."""
        du, dv = u1 - u0, v1 - v0
        along = np.clip(((self.u - u0) * du + (self.v - v0) * dv) / (du * du + dv * dv), 0, 1)
        return self.fill(np.hypot(self.u - u0 - along * du, self.v - v0 - along * dv) - half)

    def turned(self, angle: Ink, u: float = 0.0, v: float = 0.0) -> Sheet:
        """The sheet as seen by a thing turned by `angle` (T, 1, 1) radians about (u, v)."""
        c, s = np.cos(angle), np.sin(angle)
        x, y = self.u - u, self.v - v
        return Sheet(u + c * x + s * y, v - s * x + c * y, self.pixel, self.at)


def _t(values: NDArray[np.floating]) -> Ink:
    """Per-frame values (T,) as (T, 1, 1)."""
    return values[:, None, None].astype(np.float32)


def _over(*layers: Ink) -> Ink:
    """The darkest ink of all layers."""
    out = layers[0]
    for layer in layers[1:]:
        out = np.maximum(out, layer)
    return out


def _pulse(cue: Cue, at: Wave, half_s: float) -> Wave:
    """1 at each event, halving every half_s."""
    return np.exp2(-cue.since(at) / np.float32(half_s))


# --- pictures -------------------------------------------------------------------------------------------------------------


def draw_ball(cue: Cue, on: Sheet) -> Ink:
    f = cue.phase(on.at) % 1
    height = _t(4 * f * (1 - f))
    return _over(on.disc(0, 0.5 - 1.1 * height, 0.42), on.box(0, 0.99, 0.75, 0.06))


def draw_bell(cue: Cue, on: Sheet) -> Ink:
    swung = on.turned(_t(0.6 * np.cos(np.pi * cue.phase(on.at))), 0, -0.8)
    profile = 0.3 + 0.25 * np.clip(swung.v + 0.5, 0, 2) ** 2
    body = swung.fill(np.maximum(np.abs(swung.u) - profile, np.abs(swung.v) - 0.62))
    return _over(body, swung.disc(0, 0.78, 0.17), swung.disc(0, -0.75, 0.14))


def draw_bird(cue: Cue, on: Sheet) -> Ink:
    lift = _t(np.cos(2 * np.pi * cue.phase(on.at)))
    ink = _over(on.fill((np.hypot(on.u / 0.24, (on.v - 0.1) / 0.36) - 1) * 0.28), on.disc(0, -0.32, 0.17))
    elbow, tip = 0.05 - 0.5 * lift, 0.1 - 0.75 * lift
    for side in (-1.0, 1.0):
        ink = _over(ink, on.bar(side * 0.1, 0, side * 0.54, elbow, 0.12), on.bar(side * 0.54, elbow, side * 0.95, tip, 0.08))
    return ink


def draw_fan(cue: Cue, on: Sheet) -> Ink:
    radius, angle = np.hypot(on.u, on.v), np.arctan2(on.u, -on.v)
    petal = np.cos(3 * (angle - _t(2 * np.pi / 3 * cue.phase(on.at))))
    blades = on.fill(np.maximum((0.1 - petal) * 0.33 * radius, radius - 0.8))
    return _over(blades, on.disc(0, 0, 0.18))


def draw_hammer(cue: Cue, on: Sheet) -> Ink:
    f = cue.phase(on.at) % 1
    lift = np.where(f < 0.75, np.sin(np.pi / 2 * f / 0.75), 1 - ((f - 0.75) / 0.25) ** 2)
    swung = on.turned(_t(0.95 * lift), 0.95, 0.3)
    return _over(swung.bar(0.95, 0.3, -0.45, 0.3, 0.09), swung.box(-0.5, 0.3, 0.2, 0.36), on.box(-0.5, 0.85, 0.45, 0.18))


def draw_heart(cue: Cue, on: Sheet) -> Ink:
    since = cue.since(on.at)
    beat = np.exp2(-since / 0.08) + np.where(since > 0.2, 0.7 * np.exp2(-(since - 0.2) / 0.08), 0)
    scale = _t(0.62 + 0.38 * np.minimum(beat, 1))
    x, y = np.abs(on.u) / scale, -on.v / scale + 0.25
    lobe = np.hypot(x - 0.42, y - 0.42) - 0.55
    point = np.maximum(0.72 * (x - y) - 0.68, y - 0.5)
    return on.fill(np.minimum(lobe, np.maximum(point, x - 0.95)) * scale)


def draw_pendulum(cue: Cue, on: Sheet) -> Ink:
    swing = 0.5 * np.cos(np.pi * cue.phase(on.at))
    u, v = _t(1.5 * np.sin(swing)), _t(1.5 * np.cos(swing) - 0.9)
    return _over(on.bar(0, -0.9, u, v, 0.06), on.disc(u, v, 0.3), on.box(0, -0.95, 0.3, 0.08))


def draw_piston(cue: Cue, on: Sheet) -> Ink:
    turn = 2 * np.pi * cue.phase(on.at)
    top = _t(-0.35 - 0.38 * np.cos(turn))
    pin_u, pin_v = _t(0.38 * np.sin(turn)), _t(0.7 - 0.25 * np.cos(turn))
    walls = _over(on.box(-0.62, -0.35, 0.08, 0.65), on.box(0.62, -0.35, 0.08, 0.65))
    return _over(walls, on.box(0, top, 0.48, 0.24), on.bar(0, top, pin_u, pin_v, 0.09), on.disc(pin_u, pin_v, 0.2))


def draw_rain(cue: Cue, on: Sheet) -> Ink:
    cloud = _over(on.disc(-0.45, -0.7, 0.3), on.disc(0, -0.8, 0.36), on.disc(0.45, -0.7, 0.3), on.box(0, -0.55, 0.6, 0.15))
    gust = _t(0.15 + 0.85 * _pulse(cue, on.at, 0.12))
    ink = cloud
    for k in range(8):
        u = -0.77 + 0.22 * k
        head = -0.3 + 1.35 * ((_t(on.at) * 2.3 + 0.618 * k) % 1)
        ink = _over(ink, on.bar(u, head - 0.32 * gust, u - 0.06 * gust, head, 0.05) * (0.25 + 0.75 * gust))
    return ink


def draw_rocket(cue: Cue, on: Sheet) -> Ink:
    v = _t(0.7 - 1.1 * (cue.phase(on.at) % 1))
    nose = on.fill(np.maximum(np.abs(on.u) - 0.5 * (on.v - v + 0.85), np.abs(on.v - v + 0.6) - 0.25) * 0.9)
    fins = on.fill(np.maximum(np.abs(on.u) - 0.25 - 1.2 * (on.v - v), np.abs(on.v - v - 0.12) - 0.18) * 0.65)
    flame = on.fill((np.hypot(on.u / 0.2, (on.v - v - 0.5) / 0.3) - 1) * 0.2)
    return _over(nose, on.box(0, v - 0.05, 0.24, 0.35), fins, 0.6 * flame)


def draw_siren(cue: Cue, on: Sheet) -> Ink:
    left = _t(np.floor(cue.phase(on.at) + 1e-4) % 2)
    ink = on.box(0, 0.72, 0.95, 0.2)
    for side, lit in ((-1.0, left), (1.0, 1 - left)):
        halo = np.clip(1 - np.hypot(on.u - side * 0.5, on.v) / 0.75, 0, 1)
        ink = _over(ink, on.disc(side * 0.5, 0.1, 0.4) * (0.2 + 0.8 * lit), halo * 0.8 * lit)
    return ink


def draw_spring(cue: Cue, on: Sheet) -> Ink:
    since = cue.since(on.at)
    foot = _t(0.15 + 0.6 * np.exp2(-since / 0.22) * np.cos(2 * np.pi * 3 * since))
    along = (on.v + 0.8) / (foot + 0.8)
    zigzag = 0.5 * (2 / np.pi) * np.arcsin(np.sin(2 * np.pi * 3.5 * along))
    coil = on.fill(np.maximum((np.abs(on.u - zigzag) - 0.2) * 0.5, np.abs(along - 0.5) - 0.5))
    return _over(coil, on.box(0, -0.88, 0.7, 0.1), on.box(0, foot + 0.15, 0.5, 0.17))


def draw_string(cue: Cue, on: Sheet) -> Ink:
    since = cue.since(on.at)
    swing = _t(0.75 * np.exp2(-since / 0.18))
    shape = np.cos(np.clip(on.u, -1, 1) * np.pi / 2)
    line = on.fill(np.abs(on.v - swing * shape * _t(np.cos(2 * np.pi * 4 * since))) - 0.12 + np.maximum(np.abs(on.u) - 1, 0))
    blur = on.fill(np.abs(on.v) - swing * shape + np.maximum(np.abs(on.u) - 1, 0))
    return _over(line, 0.35 * blur, on.box(-1.0, 0, 0.1, 0.35), on.box(1.0, 0, 0.1, 0.35))


def draw_train(cue: Cue, on: Sheet) -> Ink:
    place = (on.u - 1.3 * _t(cue.phase(on.at))) % 1.3 - 0.65  # a coupling passes the middle on a beat
    car = on.fill(np.maximum(np.abs(place) - 0.53, np.abs(on.v + 0.05) - 0.5))
    wheels = on.fill(np.hypot(np.abs(place) - 0.32, on.v - 0.5) - 0.19)
    view = on.box(0, 0, 1.0, 1)
    return _over(_over(car, wheels) * view, on.box(0, 0.76, 1.0, 0.06))


def draw_waves(cue: Cue, on: Sheet) -> Ink:
    swell = _t(0.5 + 0.5 * np.cos(2 * np.pi * cue.phase(on.at)))
    top = 0.65 - (0.15 + 1.0 * swell) * (0.5 + 0.5 * np.cos(np.pi * on.u))
    ripple = 0.09 * np.sin(7 * on.u + _t(4 * on.at))
    foam = np.float32(0.25) * (on.v < top + ripple + 0.2)
    return on.fill(np.maximum(top + ripple - on.v, np.maximum(np.abs(on.u), on.v) - 1)) * (0.75 + foam)


# --- sounds ---------------------------------------------------------------------------------------------------------------


def sing_ball(cue: Cue, rng: np.random.Generator) -> Wave:
    return strike(cue.beats, cue.seconds, lambda s, _: decay(s, 0.05) * glide(s, 450 * cue.pitch, -3.0))


def sing_bell(cue: Cue, rng: np.random.Generator) -> Wave:
    ratios, weights = (1.0, 2.0, 2.4, 3.0, 4.5, 5.33), (0.6, 1.0, 0.7, 0.5, 0.4, 0.3)
    return strike(cue.beats, cue.seconds, lambda s, _: decay(s, 0.14) * partials(s, 420 * cue.pitch, ratios, weights), 1.0)


def sing_bird(cue: Cue, rng: np.random.Generator) -> Wave:
    def chirp(s: Wave, _: int) -> Wave:
        return np.sin(np.pi * np.clip(s / 0.16, 0, 1)) ** 0.5 * glide(s, 2000 * cue.pitch, 5.0)

    return strike(cue.beats, cue.seconds, chirp, 0.16)


def sing_fan(cue: Cue, rng: np.random.Generator) -> Wave:
    at = clock(cue.seconds)
    phase = cue.phase(at)
    hum = sum(np.sin(2 * np.pi * 110 * k * phase) / k**0.7 for k in (1, 2, 3, 5, 7))
    return np.asarray(hum * (0.25 + 0.75 * (0.5 + 0.5 * np.cos(2 * np.pi * phase)) ** 2), np.float32)


def sing_hammer(cue: Cue, rng: np.random.Generator) -> Wave:
    noise = band_noise(rng, round(cue.seconds * 16_000) + 16_000, 2600 * cue.pitch, 0.25)

    def clang(s: Wave, number: int) -> Wave:
        burst = noise[number * 977 : number * 977 + len(s)]
        return decay(s, 0.03) * (burst + partials(s, 1900 * cue.pitch, (1.0, 1.51), (0.5, 0.4)))

    return strike(cue.beats, cue.seconds, clang, 0.3)


def sing_heart(cue: Cue, rng: np.random.Generator) -> Wave:
    both = np.sort(np.concatenate([cue.beats, cue.beats + np.float32(0.2)]))
    ratios, weights = (1.0, 1.6, 2.3), (1.0, 0.6, 0.3)
    return strike(both, cue.seconds, lambda s, _: decay(s, 0.035) * partials(s, 100 * cue.pitch, ratios, weights), 0.3)


def sing_pendulum(cue: Cue, rng: np.random.Generator) -> Wave:
    def tick(s: Wave, number: int) -> Wave:
        return decay(s, 0.012) * partials(s, (1250 if number % 2 else 1000) * cue.pitch, (1.0, 2.7), (1.0, 0.4))

    return strike(cue.beats, cue.seconds, tick, 0.15)


def sing_piston(cue: Cue, rng: np.random.Generator) -> Wave:
    at = clock(cue.seconds)
    saw = sum(np.sin(2 * np.pi * 95 * cue.pitch * k * at) / k**0.7 for k in range(1, 16))
    since = cue.since(at)
    return np.asarray(saw * (0.12 + attack(since, 0.01) * np.exp2(-since / 0.1)), np.float32)


def sing_rain(cue: Cue, rng: np.random.Generator) -> Wave:
    at = clock(cue.seconds)
    since = cue.since(at)
    return band_noise(rng, len(at), 3600 * cue.pitch, 0.1) * (0.2 + attack(since, 0.02) * np.exp2(-since / 0.12))


def sing_rocket(cue: Cue, rng: np.random.Generator) -> Wave:
    at = clock(cue.seconds)
    f = cue.phase(at) % 1
    turns = np.cumsum(600 * cue.pitch * np.exp2(1.5 * f)) / 16_000
    envelope = np.minimum(np.minimum(f / 0.06, 1), (1 - f) / 0.15)
    return np.asarray((np.sin(2 * np.pi * turns) + 0.4 * np.sin(4 * np.pi * turns)) * np.minimum(envelope, 1), np.float32)


def sing_siren(cue: Cue, rng: np.random.Generator) -> Wave:
    at = clock(cue.seconds)
    high = np.floor(cue.phase(at) + 1e-4) % 2
    turns = np.cumsum(560 * cue.pitch * np.where(high > 0, 1.335, 1.0)) / 16_000
    return np.asarray(sum(np.sin(2 * np.pi * k * turns) / k for k in (1, 3, 5)), np.float32)


def sing_spring(cue: Cue, rng: np.random.Generator) -> Wave:
    def boing(s: Wave, _: int) -> Wave:
        return decay(s, 0.12) * glide(s + 0.01 * np.sin(2 * np.pi * 9 * s), 1100 * cue.pitch, -4.0)

    return strike(cue.beats, cue.seconds, boing, 0.7)


def sing_string(cue: Cue, rng: np.random.Generator) -> Wave:
    ratios = tuple(float(k) for k in range(1, 9))
    weights = tuple(1 / k for k in ratios)
    return strike(cue.beats, cue.seconds, lambda s, _: decay(s, 0.12) * partials(s, 290 * cue.pitch, ratios, weights), 0.9)


def sing_train(cue: Cue, rng: np.random.Generator) -> Wave:
    rumble = band_noise(rng, round(cue.seconds * 16_000), 130 * cue.pitch, 0.35)
    both = np.sort(np.concatenate([cue.beats, cue.beats + np.float32(0.1)]))

    def clack(s: Wave, _: int) -> Wave:
        return decay(s, 0.015) * partials(s, 620 * cue.pitch, (1.0, 1.4, 2.3), (1.0, 0.8, 0.6))

    return np.float32(0.15) * rumble + strike(both, cue.seconds, clack, 0.15)


def sing_waves(cue: Cue, rng: np.random.Generator) -> Wave:
    at = clock(cue.seconds)
    swell = 0.5 + 0.5 * np.cos(2 * np.pi * cue.phase(at))
    return band_noise(rng, len(at), 900 * cue.pitch, 0.35) * (0.12 + swell**1.5).astype(np.float32)


@dataclass(frozen=True)
class Thing:
    """A class: its picture and its sound."""

    name: str
    draw: Callable[[Cue, Sheet], Ink]
    sing: Callable[[Cue, np.random.Generator], Wave]


THINGS = {
    thing.name: thing
    for thing in (
        Thing("ball", draw_ball, sing_ball),
        Thing("bell", draw_bell, sing_bell),
        Thing("bird", draw_bird, sing_bird),
        Thing("fan", draw_fan, sing_fan),
        Thing("hammer", draw_hammer, sing_hammer),
        Thing("heart", draw_heart, sing_heart),
        Thing("pendulum", draw_pendulum, sing_pendulum),
        Thing("piston", draw_piston, sing_piston),
        Thing("rain", draw_rain, sing_rain),
        Thing("rocket", draw_rocket, sing_rocket),
        Thing("siren", draw_siren, sing_siren),
        Thing("spring", draw_spring, sing_spring),
        Thing("string", draw_string, sing_string),
        Thing("train", draw_train, sing_train),
        Thing("waves", draw_waves, sing_waves),
    )
}
CLASSES = tuple(THINGS)
