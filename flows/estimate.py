"""What a job will take, before it is begun: storage, traffic, time of the ingest, hours of GPUs, by arithmetic on measured rates.

A line whose figure nobody measured says so; prices are the user's, in any currency.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal

from cmacc.flows.rates import ProfileRates, Rates
from cmacc.ingest import GUEST_VIDEOS_PER_HOUR, WEB_CLIENT_VIDEOS_PER_HOUR
from cmacc.ingest.causes import HOUR_S
from cmacc.shards.profile import PROFILES
from cmacc.train.config import PretrainConfig
from cmacc.train.loading.views import ViewConfig
from cmacc.train.networks.flops import PEAK_TFLOPS, encoder_flops, gpu_name, peak_flops

GB = 1e9
SHARES = (1.0, 0.5, 0.25, 0.1)
"""Of the GPU's peak, for which GPU hours are told where the share was neither measured nor given."""

Basis = Literal["measured", "computed", "given", "stated", "not measured"]


@dataclass(frozen=True)
class Job:
    """clips: that shall be in the data set; clips that fail come on top. gpu: as `h100`. profile: of the clips, at its default
    settings. clip_s: seconds a clip. clips_per_video: that come from one source video. videos_per_hour: the site's budget, where
    it is known. cores: that ingest. gpus: that train together. epochs: instead of the recipe's steps. mfu: share of the GPU's
    peak, as `speed/mfu` in a run's log."""

    clips: int
    gpu: str
    profile: str = "h264"
    clip_s: float = 10.0
    clips_per_video: float = 1.0
    videos_per_hour: float | None = None
    cores: int = 2
    gpus: int = 1
    epochs: float | None = None
    mfu: float | None = None

    def __post_init__(self) -> None:
        for name in ("clips", "cores", "gpus"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give 1 or more")
        for name in ("clip_s", "clips_per_video", "videos_per_hour", "epochs"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}; give a number above 0")
        if self.mfu is not None and not 0 < self.mfu <= 1:
            raise ValueError(f"mfu is {self.mfu}; give the share of the GPU's peak, above 0 and up to 1, as 0.3")
        if self.profile not in PROFILES:
            raise ValueError(f"profile {self.profile!r} is not known; use one of {', '.join(PROFILES)}")
        if gpu_name(self.gpu) is None:
            raise ValueError(f"gpu {self.gpu!r} is not known; use one of {', '.join(PEAK_TFLOPS)}")

    @property
    def seconds(self) -> float:
        """Of all clips together."""
        return self.clips * self.clip_s


@dataclass(frozen=True)
class CloudPrices:
    """In any currency, None if not given: of a GB stored for a month, of a GB read out of the bucket, of an hour of one GPU."""

    gb_month: float | None = None
    egress_gb: float | None = None
    gpu_hour: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            price = getattr(self, field.name)
            if price is not None and not 0 <= price < math.inf:
                raise ValueError(f"price_{field.name} is {price}; give 0 or more")


@dataclass(frozen=True)
class Line:
    """amount: in `unit`, None where nothing tells. cost: None without a price. basis: what the figure rests on; source: where
    that comes from."""

    what: str
    amount: float | None
    unit: str
    basis: Basis
    source: str
    cost: float | None = None


def estimate(job: Job, config: PretrainConfig, prices: CloudPrices, rates: Rates) -> list[Line]:
    """The lines, in the order of the work. Raises ValueError with one sentence for what cannot be reckoned."""
    if job.profile not in rates.profiles:
        raise ValueError(
            f"profile {job.profile!r} was not measured; run infra/bench/rates.py, or use {', '.join(rates.profiles)}"
        )
    of = rates.profiles[job.profile]
    steps = config.steps if job.epochs is None else math.ceil(job.epochs * job.clips / config.loader.batch)
    seen = steps * config.loader.batch
    return [*_ingest(job, of), *_bucket(job, of, seen, prices), *_training(job, config, of, steps, prices, rates)]


def _ingest(job: Job, of: ProfileRates) -> list[Line]:
    """By the slower of two, as `cmacc status` has it: the site's budget, or the processor."""
    work_s = job.seconds * of.transcode.value
    budgets: list[tuple[str, float, Basis, str]] = [
        ("a guest session of YouTube", GUEST_VIDEOS_PER_HOUR, "stated", "cmacc.ingest.GUEST_VIDEOS_PER_HOUR, by yt-dlp's wiki"),
        (
            "YouTube's web client with a PO token", WEB_CLIENT_VIDEOS_PER_HOUR, "stated",
            "cmacc.ingest.WEB_CLIENT_VIDEOS_PER_HOUR, by yt-dlp's wiki",
        ),
    ]  # fmt: skip
    if job.videos_per_hour is not None:
        budgets = [("the budget given", job.videos_per_hour, "given", "--videos-per-hour")]
    cores = f"{job.cores} core{'s' * (job.cores > 1)}"
    lines = [
        Line("download, bytes", None, "GB", "not measured", "it needs the site; `cmacc status` tells it while an ingest runs"),
        Line(f"cutting and encoding, {cores}", work_s / job.cores / HOUR_S, "h", "measured", of.transcode.source()),
    ]
    for name, rate, basis, source in budgets:
        hours, limit = max(
            (job.clips / job.clips_per_video / rate, "that"), (work_s / job.cores / HOUR_S, f"what {cores} can do")
        )
        said = f"{source}: {rate:g} videos an hour, all machines together; the limit here is {limit}"
        lines.append(Line(f"ingest, {name}", hours, "h", basis, said))
    return lines


def _bucket(job: Job, of: ProfileRates, seen: int, prices: CloudPrices) -> list[Line]:
    stored, read = job.seconds * of.stored.value / GB, seen * job.clip_s * of.read.value / GB
    once = stored * min(1.0, seen / job.clips)
    cached = f"{of.stored.source()}; where CMACC_CACHE_GB holds all of it, each machine reads it once"
    return [
        Line("stored", stored, "GB", "measured", of.stored.source(), _cost(stored, prices.gb_month)),
        Line("read by training, no cache", read, "GB", "measured", of.read.source(), _cost(read, prices.egress_gb)),
        Line("read by training, all in a cache", once, "GB", "measured", cached, _cost(once, prices.egress_gb)),
    ]


def _training(job: Job, config: PretrainConfig, of: ProfileRates, steps: int, prices: CloudPrices, rates: Rates) -> list[Line]:
    name, precision = str(gpu_name(job.gpu)), "float32" if config.compute.precision == "float32" else "bf16"
    peak = peak_flops(name, precision)
    if peak is None:
        raise ValueError(f"the {name} has no {precision} that is known here; give --set compute.precision=float32")
    each, seen = encoder_flops(config.encoders, config.view), steps * config.loader.batch
    least = each * seen / peak / HOUR_S
    asked = "the recipe's steps" if job.epochs is None else "--epochs"
    epochs = f"{asked}: {steps:,} of {config.loader.batch} clips, {seen / job.clips:.3g} epochs of {job.clips:,}"
    flops = "counted by cmacc.train.networks.flops: queries forward and backward, keys forward"
    sheet = f"NVIDIA's data sheet: {peak / 1e12:g} TFLOP/s, {precision} (cmacc.train.networks.flops)"
    lines = [
        Line("clips seen in training", float(seen), "clips", "given" if job.epochs else "computed", epochs),
        Line("work on one clip", each / 1e9, "GFLOP", "computed", flops),
    ]
    measured = rates.utilisation.get(name) if precision == "bf16" else None
    if job.mfu is not None:
        shares: list[tuple[float, Basis, str]] = [(job.mfu, "given", f"--mfu; {sheet}")]
    elif measured:
        shares = [(measured.value, "measured", f"{measured.source()}; {sheet}")]
    else:
        why = f"how much of its peak this {name} reaches was not measured: if it were so much; --mfu gives it. {sheet}"
        shares = [(share, "not measured", why) for share in SHARES]
    for share, basis, source in shares:
        hours, at = least / share, f"{100 * share:.3g} % of peak"
        lines.append(Line(f"GPU hours, {at}", hours, "GPU h", basis, source, _cost(hours, prices.gpu_hour)))
        if job.gpus > 1:
            even = f"the GPU hours shared evenly; what {job.gpus} GPUs lose by waiting for each other was not measured"
            lines.append(Line(f"by the clock on {job.gpus} GPUs, {at}", hours / job.gpus, "h", "not measured", even))
    known = shares[0][0] if len(shares) == 1 else None
    return [*lines, _feeding(config, of, None if known is None else job.gpus * peak * known / each)]


def _feeding(config: PretrainConfig, of: ProfileRates, wanted: float | None) -> Line:
    """What decoding on a CPU can give, or the cores for so many clips a second."""
    what, unit = ("decoding, one core", "clips/s") if wanted is None else (f"decoding {wanted:,.0f} clips/s", "cores")
    view, plain = config.view, ViewConfig()
    if (view.frames, view.view_s, view.size, view.second) != (plain.frames, plain.view_s, plain.size, plain.second):
        return Line(what, None, unit, "not measured", "not for this recipe's views; `cmacc bench loader` measures them")
    source = f"{of.load.source()}; on NVDEC it was not measured: python infra/bench/loader_gpu.py"
    return Line(what, 1 / of.load.value if wanted is None else wanted * of.load.value, unit, "measured", source)


def _cost(amount: float, price: float | None) -> float | None:
    return None if price is None else amount * price
