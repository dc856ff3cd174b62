"""`cmacc plan`: its arithmetic by hand, what each line rests on, refusals, and the measured rates that come with the package."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from cmacc.flows import estimate as reckoning
from cmacc.flows.cli import main
from cmacc.flows.estimate import CloudPrices, Job, Line, estimate
from cmacc.flows.rates import ProfileRates, Rate, Rates, measured
from cmacc.shards.options import from_json
from cmacc.shards.profile import PROFILES
from cmacc.train.config import PretrainConfig, change, recipe

REPOSITORY = Path(__file__).resolve().parents[1]
SCRIPT = REPOSITORY / "infra" / "bench" / "rates.py"


def rate(value: float, unit: str = "units") -> Rate:
    return Rate(value, unit, "python measure.py", "2 recordings", "2 cores", "2026-11-29")


PROFILE = ProfileRates(stored=rate(100_000), read=rate(80_000), transcode=rate(0.36), load=rate(0.02))
RATES = Rates({"h264": PROFILE})
JOB = Job(clips=3_600, gpu="h100")
CONFIG = change(PretrainConfig(), {"steps": 900, "loader.batch": 8})  # 7,200 clips are seen
PRICES = CloudPrices(gb_month=0.5, egress_gb=0.25, gpu_hour=3.0)


@pytest.fixture(autouse=True)
def one_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    """494.5 GFLOP: of an H100, whose data sheet says 989 TFLOP/s in bf16, half a millisecond."""
    monkeypatch.setattr(reckoning, "encoder_flops", lambda encoders, view: 494_500_000_000)


def lines(job: Job = JOB, config: PretrainConfig = CONFIG, prices: CloudPrices = PRICES, rates: Rates = RATES) -> dict[str, Line]:
    return {line.what: line for line in estimate(job, config, prices, rates)}


def amount(line: Line) -> Any:
    return pytest.approx(line.amount)


def test_storage_and_traffic() -> None:
    """36,000 s of clips: 3.6 GB at 100 kB/s. 7,200 of 10 s are read, at 80 kB/s 5.76 GB."""
    found = lines()
    assert (found["stored"].unit, 3.6, 1.8) == ("GB", amount(found["stored"]), pytest.approx(found["stored"].cost))
    uncached, cached = found["read by training, no cache"], found["read by training, all in a cache"]
    assert (amount(uncached), pytest.approx(uncached.cost)) == (5.76, 1.44)
    assert (amount(cached), pytest.approx(cached.cost)) == (3.6, 0.9)
    half = lines(replace(JOB, epochs=0.5))["read by training, all in a cache"]
    assert amount(half) == 1.8, "of a data set that is not read whole, what is read"


def test_the_ingest_goes_by_the_slower_of_budget_and_processors() -> None:
    """36,000 s at .36 processor seconds each are 3.6 hours of a core; 3,600 videos are 12 hours at 300 an hour."""
    found = lines()
    assert amount(found["cutting and encoding, 2 cores"]) == 1.8
    guest, web = found["ingest, a guest session of YouTube"], found["ingest, YouTube's web client with a PO token"]
    assert amount(guest) == 12.0 and "limit here is that" in guest.source
    assert amount(web) == 3.6 and web.basis == "stated"
    assert amount(lines(replace(JOB, clips_per_video=4))["ingest, a guest session of YouTube"]) == 3.0
    fast = lines(replace(JOB, videos_per_hour=10_000))
    assert amount(fast["ingest, the budget given"]) == 1.8 and "what 2 cores can do" in fast["ingest, the budget given"].source
    assert not any("YouTube" in what for what in fast)


def test_gpu_hours_at_a_share_that_is_given() -> None:
    """7,200 clips at half the peak, 1,000 a second: 7.2 s, which is .002 hours. One clip costs the loader 20 ms."""
    found = lines(replace(JOB, mfu=0.5, gpus=4))
    hours = found["GPU hours, 50 % of peak"]
    assert (amount(hours), pytest.approx(hours.cost), hours.basis) == (0.002, 0.006, "given")
    assert amount(found["by the clock on 4 GPUs, 50 % of peak"]) == 0.0005
    assert amount(found["decoding 4,000 clips/s"]) == 80.0
    assert amount(found["work on one clip"]) == 494.5 and found["clips seen in training"].amount == 7_200


def test_gpu_hours_of_a_gpu_that_was_measured() -> None:
    measured_too = replace(RATES, utilisation={"H100": rate(0.25, "of the bf16 peak")})
    found = lines(replace(JOB, gpu="NVIDIA H100 80GB HBM3"), rates=measured_too)
    hours = found["GPU hours, 25 % of peak"]
    assert (amount(hours), hours.basis) == (0.004, "measured") and "`python measure.py`, 2 recordings" in hours.source
    assert any(line.basis == "not measured" for line in lines(replace(JOB, gpu="a100"), rates=measured_too).values())


def test_gpu_hours_of_a_gpu_that_nobody_measured_are_a_function() -> None:
    found = {what: line for what, line in lines().items() if what.startswith("GPU hours")}
    assert [line.amount for line in found.values()] == pytest.approx([0.001, 0.002, 0.004, 0.01])
    assert {line.basis for line in found.values()} == {"not measured"}
    assert all("was not measured" in line.source and "--mfu gives it" in line.source for line in found.values())
    assert amount(lines()["decoding, one core"]) == 50.0


def test_epochs_are_whole_steps() -> None:
    """Half an epoch of 3,601 clips is 1,800.5 of them: 226 batches of 8."""
    found = lines(replace(JOB, clips=3_601, epochs=0.5))["clips seen in training"]
    assert (found.amount, found.basis) == (1_808, "given")


def test_float32_has_a_peak_of_its_own() -> None:
    """494 TFLOP/s instead of 989; a V100 has no bf16."""
    slow = change(CONFIG, {"compute.precision": "float32"})
    assert lines(replace(JOB, mfu=0.5), slow)["GPU hours, 50 % of peak"].amount == pytest.approx(0.002 * 989 / 494)
    with pytest.raises(ValueError, match="V100 has no bf16 that is known here; give"):
        lines(replace(JOB, gpu="v100"))
    assert lines(replace(JOB, gpu="v100"), slow)


def test_views_that_were_not_measured_are_said_to_be() -> None:
    small = lines(config=change(CONFIG, {"view.frames": 8}))["decoding, one core"]
    assert (small.amount, small.basis) == (None, "not measured")


def test_every_line_says_what_it_rests_on_and_costs_nothing_without_a_price() -> None:
    found = lines(prices=CloudPrices()).values()
    assert all(line.source and line.basis for line in found) and all(line.cost is None for line in found)
    assert all(line.amount is not None or line.basis == "not measured" for line in found)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"clips": 0}, "clips is 0; give 1 or more"),
        ({"gpu": "h900"}, "gpu 'h900' is not known; use one of B200, H200"),
        ({"profile": "h266"}, "profile 'h266' is not known; use one of h264"),
        ({"clip_s": 0.0}, "clip_s is 0.0; give a number above 0"),
        ({"clips_per_video": float("nan")}, "clips_per_video is nan; give"),
        ({"videos_per_hour": -1.0}, "videos_per_hour is -1.0; give"),
        ({"epochs": 0.0}, "epochs is 0.0; give"),
        ({"mfu": 0.0}, "mfu is 0.0; give the share"),
        ({"mfu": 35.0}, "mfu is 35.0; give the share of the GPU's peak, above 0 and up to 1, as 0.3"),
        ({"gpus": 0}, "gpus is 0; give 1 or more"),
    ],
)
def test_jobs_that_cannot_be(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}"):
        replace(JOB, **given)


def test_a_profile_without_rates() -> None:
    with pytest.raises(ValueError, match="profile 'vp9' was not measured; run"):
        lines(replace(JOB, profile="vp9"))


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["cmacc", "plan", *arguments])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_help_has_an_example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(monkeypatch, "--help") == 0
    assert "Example: cmacc plan --clips 2000000 --recipe paper --gpu h100" in " ".join(capsys.readouterr().out.split())


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("--clips", "2000000", "--recipe", "paper", "--gpu", "h100", "--price-gpu-hour", "3")
    assert command(monkeypatch, *asked) == 0
    said = capsys.readouterr().out
    assert "278 days" in said, "two million videos, 300 an hour"
    assert "was not measured" in said and "infra/bench/rates.py" in said
    assert command(monkeypatch, *asked, "--mfu", "0.5", "--json") == 0
    expected = estimate(Job(2_000_000, "h100", mfu=0.5), recipe("paper"), CloudPrices(gpu_hour=3.0), measured())
    assert json.loads(capsys.readouterr().out) == [asdict(line) for line in expected]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--clips", "0", "--gpu", "h100"), "clips is 0; give 1 or more"),
        (("--clips", "5", "--gpu", "abacus"), "gpu 'abacus' is not known"),
        (("--clips", "5", "--gpu", "h100", "--recipe", "soup"), "recipe 'soup' is not known"),
        (("--clips", "5", "--gpu", "h100", "--price-gb-month", "-1"), "price_gb_month is -1.0; give 0 or more"),
        (("--clips", "5", "--gpu", "h100", "--price-egress-gb", "nan"), "price_egress_gb is nan; give 0 or more"),
        (("--clips", "5", "--gpu", "h100", "--price-gpu-hour", "inf"), "price_gpu_hour is inf; give 0 or more"),
    ],
)
def test_refusals_of_the_command(
    arguments: tuple[str, ...], sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, *arguments) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"cmacc: {sentence}") and len(said.splitlines()) == 1


def every_rate(rates: Rates) -> list[Rate]:
    return [*(getattr(p, name) for p in rates.profiles.values() for name in asdict(p)), *rates.utilisation.values()]


def test_the_rates_of_the_repository_are_measured_ones() -> None:
    rates = measured()
    assert list(rates.profiles) == list(PROFILES)
    for each in every_rate(rates):
        assert each.value > 0 and each.unit and each.of and each.machine
        script = each.command.split()[1]
        assert (REPOSITORY / script).is_file(), f"{script} measures it"
        assert "/" not in each.machine
    for profile in rates.profiles.values():
        assert profile.stored.value > profile.read.value, "indexes and headers come on top"


def run_script(*arguments: object) -> Rates:
    out = Path(str(arguments[-1]))
    done = subprocess.run(
        [sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=900
    )
    assert done.returncode == 0, done.stderr
    return from_json(Rates, json.loads(out.read_text()))


def test_what_was_measured_of_gpus_is_taken_over(tmp_path: Path) -> None:
    """From files as infra/bench/trainer_gpu.py writes them; and the repository's rates have what its results say."""
    fast = "bf16, compiled, channels last"
    told = {"machine": {"device": "NVIDIA A100-SXM4-80GB"}, "batch": 128, fast: {"clips_per_s": 500.0, "mfu": 0.21}}
    (tmp_path / "trainer-NVIDIA-A100-SXM4-80GB.json").write_text(json.dumps(told))
    (tmp_path / "trainer-Abacus.json").write_text(json.dumps({**told, "machine": {"device": "Abacus"}}))
    (tmp_path / "trainer-T4.json").write_text(json.dumps({**told, "machine": {"device": "T4"}, fast: {}}))
    found = run_script("--results", tmp_path, "--out", tmp_path / "rates.json")
    assert {name: each.value for name, each in found.utilisation.items()} == {"A100": 0.21}
    assert found.profiles == measured().profiles, "nothing else changes"
    assert run_script("--out", tmp_path / "again.json") == measured(), "run infra/bench/rates.py after a GPU was measured"


@pytest.mark.long
def test_the_rates_can_be_measured_again(tmp_path: Path) -> None:
    """On two made recordings of 12 s, of which the first 10 become a clip."""
    makes = "import sys; from pathlib import Path; from media import Look, make_media; "
    makes += "make_media(Path(sys.argv[1]), 2, ((0.0, 10.0),), Look(320, 240, 25, 12.0), distinct=2)"
    subprocess.run(
        [sys.executable, "-c", makes, str(tmp_path / "media")],
        env={**os.environ, "PYTHONPATH": str(SCRIPT.parent)}, check=True, timeout=300,
    )  # fmt: skip
    found = run_script("--recordings", tmp_path / "media", "--out", tmp_path / "rates.json")
    assert list(found.profiles) == list(PROFILES)
    assert all(each.value > 0 for each in every_rate(found))
    assert all("2 recordings, 20 s in all, median picture 320x240" in each.of for each in every_rate(found))
    assert found.profiles["mjpeg"].stored.value > found.profiles["h264"].stored.value, "intra frames alone take more room"


def test_the_wheel_brings_the_rates_along(tmp_path: Path) -> None:
    """Built with the setuptools that is installed."""
    tree = tmp_path / "tree"
    skip = shutil.ignore_patterns("*.egg-info", "__pycache__", "ingest", "shards", "train")
    shutil.copytree(REPOSITORY / "src", tree / "src", ignore=skip)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(REPOSITORY / name, tree / name)
    build = "from setuptools import build_meta; build_meta.build_wheel('.')"
    subprocess.run([sys.executable, "-c", build], cwd=tree, check=True, capture_output=True, timeout=300)
    with zipfile.ZipFile(next(tree.glob("*.whl"))) as wheel:
        assert wheel.read("cmacc/flows/rates.json") == (REPOSITORY / "flows" / "rates.json").read_bytes()
