"""The page of a run: what it says, at any time of the run's life, and that nothing from outside is taken for HTML."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from train_data import TINY, clips, write_dataset
from typer.testing import CliRunner

from cmacc.flows.cli import app
from cmacc.train.config import change, from_json, recipe, to_json
from cmacc.train.evaluation.results import Result, write
from cmacc.train.evaluation.retrieval import Embedded
from cmacc.train.pretrain import pretrain
from cmacc.train.report.facts import Run, cost, differences, read_run
from cmacc.train.report.lines import Line, line_chart
from cmacc.train.report.nearest import evenly_over_labels, nearest_sounds
from cmacc.train.report.page import write_report

HOSTILE = '<script>alert("1")</script>'
ESCAPED = "&lt;script&gt;alert(&quot;1&quot;)&lt;/script&gt;"


pytestmark = pytest.mark.usefixtures("on_a_cpu")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on clips whose second label is hostile."""
    folder = tmp_path_factory.mktemp("report")
    some = [dataclasses.replace(c, facts=dataclasses.replace(c.facts, labels=(*c.facts.labels, HOSTILE))) for c in clips()]
    pretrain(write_dataset(folder / "data", some).url, folder / "run", change(TINY, {"steps": 4, "eval_every": 2}))
    return folder / "run"


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """A copy that may be spoilt."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


def page_of(run: Path, **options: Any) -> str:
    return write_report(run, **options).read_text()


def heads(page: str) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", page)


def test_a_finished_run(whole: Path, tmp_path: Path) -> None:
    done: list[tuple[int, int]] = []
    path = write_report(str(whole), tmp_path / "page.html", examples=2, on_progress=lambda *at: done.append(at))
    page = path.read_text()
    assert heads(page) == [
        "Configuration", "How it learns", "What is in the dictionaries", "How negatives are chosen", "Speed",
        "Held-out retrieval at step 4", "Evaluation", "Pictures and the sounds nearest to them", "Cost",
    ]  # fmt: skip
    assert "Step 4 of 4: finished." in page
    assert f"<code>cmacc evaluate {whole} --on esc50:DIR</code>" in page
    figures = re.findall(r"<figcaption>(.*?)</figcaption>", page)
    assert {
        "Loss terms, nats",
        "k-NN of features",
        "Distinct classes",
        "Spread of |R|",
        "Waiting for data, share of the time",
    } <= {*figures}
    assert len(figures) == len(set(figures)) == page.count("<figure")
    assert page.count('<article class="card') == 2 * 4
    assert done == [(4, 6), (6, 6)]
    assert HOSTILE not in page and ESCAPED in page
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page)


def test_in_mid_training_and_before_the_first_checkpoint(run: Path) -> None:
    """Of a log that is being written, and of nothing but a configuration."""
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:4]) + lines[4][: len(lines[4]) // 2])
    shutil.rmtree(run / "checkpoints")
    page = page_of(run)
    assert "Step 2 of 4: not finished." in page
    assert page.count("It has saved no checkpoint yet.") == 2
    (run / "metrics.jsonl").unlink()
    page = page_of(run)
    assert "There is no number in its log yet." in page and "Step 0 of 4: not finished." in page
    assert heads(page) == ["Configuration", "How it learns", "Evaluation", "Pictures and the sounds nearest to them", "Cost"]


def test_what_went_wrong(run: Path) -> None:
    """Told once, though a continued run met it again; a torn line is passed over; failed batches have their command."""
    alarm = {"step": 3, "kind": "trap", "action": "warn", "sentence": f"the loss is 2.00 nats below chance {HOSTILE}"}
    (run / "alarms.jsonl").write_text(2 * (json.dumps(alarm) + "\n") + '{"step": 4, "ki\n[]\n')
    (run / "quarantine.jsonl").write_text(json.dumps({"key": "yt_1", "reason": f"clip yt_1 does not decode {HOSTILE}"}) + "\n")
    (run / "quarantine.rank-1.jsonl").write_text(json.dumps({"key": "yt_2", "reason": "it neither"}) + "\n")
    (run / "failed" / "step-00000003").mkdir(parents=True)
    page = page_of(run, examples=0)
    assert heads(page)[1] == "What went wrong"
    assert page.count("the loss is 2.00 nats below chance") == 1
    assert "2 clips did not decode, and others were taken in their place" in page and "it neither" in page
    assert f"<code>cmacc replay {run / 'failed' / 'step-00000003'}</code>" in page
    assert HOSTILE not in page and "Pictures and the sounds nearest to them" not in page


def test_an_alarm_of_a_run_is_put_down(whole: Path, tmp_path: Path) -> None:
    config = from_json({k: v for k, v in json.loads((whole / "config.json").read_text()).items() if k != "data"})
    data = json.loads((whole / "config.json").read_text())["data"]
    spoilt = change(config, {"optimiser.rate": 1e30, "optimiser.warmup": 0})
    with pytest.raises(FloatingPointError) as stopped:
        pretrain(data, tmp_path / "run", spoilt)
    (alarm,) = read_run(tmp_path / "run").alarms
    assert (alarm["kind"], alarm["action"]) == ("non_finite", "stop")
    assert str(stopped.value).startswith(alarm["sentence"])
    assert "cmacc replay" in page_of(tmp_path / "run", examples=0)


def test_evaluations_and_their_pictures(run: Path) -> None:
    left_out = {"a.wav": f"no sound {HOSTILE}"}
    some = Result("esc50", "svm", "trained", 0.7123, 0.02, 1999, {"fold 1": 0.5}, left_out, ["one note"], {"C": [0.01]})
    write(run, [some, dataclasses.replace(some, encoder="random", score=0.31), dataclasses.replace(some, task="ucf101")])
    folder = run / "evaluation"
    (folder / "esc50-confusion.png").write_bytes(b"\x89PNG\r\n" + b"0" * 10)
    (folder / "esc50-classes.png").write_bytes(b"no picture")
    page = page_of(run, examples=0)
    assert [page.count(text) for text in ("71.2%", "31.0%", "<h3>esc50</h3>", "<h3>ucf101</h3>")] == [2, 1, 1, 1]
    cells = re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", page[page.index("<h3>esc50</h3>") : page.index("<h3>ucf101</h3>")])
    assert cells == ["", "trained", "random", "chance", "over", "svm", "71.2%", "31.0%", "2.0%", "1,999"]
    assert "1 file left out: a.wav (no sound &lt;script&gt;" in page and "one note" in page
    assert 'alt="esc50-confusion"' in page and "esc50-classes" not in page
    assert "cmacc evaluate" not in page and HOSTILE not in page
    (folder / "esc50.json").write_text("{}")
    assert "does not hold results" in page_of(run, examples=0)


def test_nearest_sounds(tmp_path: Path) -> None:
    """By cosine; of the same class where one of several labels is shared, and no word of it where there is no label."""
    labels = (("a", "b"), ("b", "c"), ("d",), ())
    some = [
        dataclasses.replace(c, facts=dataclasses.replace(c.facts, labels=each)) for c, each in zip(clips(), labels, strict=False)
    ]
    data = write_dataset(tmp_path / "data", some)
    video, audio = torch.eye(4), torch.tensor([[0.9, 0, 0, 0], [1, 0, 0, 0], [0.8, 0, 0, 0], [0.7, 0, 0, 0]])
    embedded = Embedded(video, audio, torch.arange(4), torch.tensor([0, 1, 2, -1]))
    hits = nearest_sounds(data, embedded, 0, 9)
    assert [(hit.row, hit.own, hit.same) for hit in hits] == [
        (1, False, True),
        (0, True, True),
        (2, False, False),
        (3, False, None),
    ]
    assert [hit.cosine for hit in hits] == pytest.approx([1, 0.9, 0.8, 0.7])
    assert nearest_sounds(data, embedded, 3, 1)[0].same is None
    assert evenly_over_labels(embedded, 2) == [0, 1] and evenly_over_labels(embedded, 9) == [3, 0, 1]


def test_a_data_set_that_is_gone(run: Path) -> None:
    config = json.loads((run / "config.json").read_text())
    config["data"] = [f"{run}/nowhere{HOSTILE}"]
    (run / "config.json").write_text(json.dumps(config))
    page = page_of(run)
    assert re.search(r"Its clips cannot be shown: .*nowhere.* does not exist", page)
    assert HOSTILE not in page


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "is not the folder of a run; give the one that `cmacc pretrain` wrote"),
        ("{", "is not what this version writes .*; make the report with the version of the run"),
        ("[]", "is not what this version writes"),
        ('{"data": [], "checkpoint_every": 3}', "is not what this version writes .*checkpoint_every"),
    ],
)
def test_what_is_no_run(tmp_path: Path, text: str | None, sentence: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=sentence) as raised:
        write_report(str(tmp_path))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "report.html").exists()


def test_what_differs_from_a_recipe() -> None:
    assert differences(recipe("paper-r2plus1d")) == ("paper-r2plus1d", {})
    changed = change(recipe("paper"), {"objective.tau": 0.2, "seed": 3})
    assert differences(changed) == ("paper", {"seed": (3, 0), "objective.tau": (0.2, 0.7)})


def test_cost() -> None:
    """By hand: 10 steps of 1 s and 30 of 2 s, at a batch of 4; a tenth of the first waited, and half of the others."""
    records: list[dict[str, Any]] = [
        {"step": 10, "speed/step_s": 1.0, "speed/waiting": 0.1, "memory/resident_gb": 2.5},
        {"step": 10, "held_out/R@1": 0.5},
        {"step": 40, "speed/step_s": 2.0, "speed/waiting": 0.5, "memory/resident_gb": 1.0, "selection/share": 0.25},
    ]
    found = cost(Run(Path(), [], TINY, records, [], [], [], None, ""))
    assert found["clips seen"] == "160"
    assert found["time of all steps"] == "1.2 min"
    assert found["clips/s"].startswith("2.29 ")
    assert found["waiting for data"].startswith("44.3%")
    assert found["choosing negatives"] == "25.0% of a step"
    assert found["memory"].startswith("2.5 GB")
    assert found["share of the device's peak"] == "not known for this device"
    assert to_json(TINY) == to_json(from_json(to_json(TINY)))


def test_a_chart() -> None:
    """Axes at round numbers, a gap where a value is missing, a dot for a value alone, the last number in the legend."""
    points = [(0, 1.0), (10, 4.0), (20, None), (30, math.nan), (40, 2.5), (50, math.inf)]
    chart = line_chart("a < b", [Line("this", points, 1), Line("none", [(0, None)], 2)], note="said")
    assert "<figcaption>a &lt; b</figcaption>" in chart and "none" not in re.sub('class="none"', "", chart)
    (path,) = re.findall(r'<path class="s1" d="(M[^"]*)"/><rect', chart)
    assert path == "M46.0 125.0h0L106.8 8.0M289.2 66.5h0"
    assert re.findall(r'text-anchor="end">([^<]*)<', chart)[:5] == ["0", "1", "2", "3", "4"]
    assert "this <b>2.5</b>" in chart
    assert line_chart("nothing", [Line("x", [], 1), Line("y", [(0, None)], 2)]) == ""
    assert "<title>about step 2\nthis: 1</title>" in line_chart("t", [Line("this", [(0, 1.0), (10, 2.0)], 1)])


def test_a_long_log_is_drawn_by_means() -> None:
    """Nothing of a step is lost in the mean; a value alone and one that does not change have a figure."""
    points = [(step, float(step % 2)) for step in range(24_000)]
    chart = line_chart("many", [Line("x", points, 1)])
    (path,) = re.findall(r'<path class="s1" d="(M[^"]*)"/><rect', chart)
    assert path.count("L") == 239
    assert len(set(re.findall(r"L[\d.]+ ([\d.]+)", path))) == 1
    for alone in ([(7, 3.0)], [(0, 15.0), (9, 15.0)], [(0, 0.0)], [(3, -2.0)], [(0, 1e-8), (5, 2e-8)]):
        assert "<path" in line_chart("few", [Line("x", alone, 1)])


def test_the_command(whole: Path, tmp_path: Path) -> None:
    told = CliRunner().invoke(app, ["report", str(whole), "--out", str(tmp_path / "page.html"), "--examples", "0"])
    assert told.exit_code == 0, told.output
    assert f"report: {tmp_path / 'page.html'}" in told.output.replace("\n", "")
    assert "Step 4 of 4: finished." in (tmp_path / "page.html").read_text()
    assert not (whole / "report.html").exists()
