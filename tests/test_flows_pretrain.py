"""What a flow shows of a run in other processes: its numbers as they come, its curves, and the arguments its ranks are given."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cmacc.flows.curves import curves
from cmacc.flows.pretrain import Watch, _arguments
from cmacc.shards.options import change
from cmacc.train.config import recipe
from cmacc.train.report.picture import draw_monitor
from cmacc.train.running.metrics import MetricsLog

RECORDS: list[dict[str, Any]] = [
    {"step": 0, "held_out/R@1": 0.1, "held_out/R@5": 0.2, "held_out/chance_R@1": 0.01, "held_out/chance_R@5": 0.05},
    *({"step": s, "loss/total": 8 / s, "loss/video_to_audio": 4 / s, "chance/video_to_audio": 4.0, "speed/clips_per_s": 9.0}
      for s in range(1, 9)),
]  # fmt: skip


def test_numbers_are_told_as_they_come(tmp_path: Path) -> None:
    told: list[tuple[int, str]] = []
    watch = Watch(tmp_path, lambda done, note="", total=None: told.append((done, note)))
    watch.look()  # nothing there yet
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write(0, {"held_out/R@5": 0.25, "held_out/chance_R@5": 0.05})
    log.write(10, {"loss/total": 3.0, "speed/clips_per_s": 7.0})
    watch.look()
    watch.look()
    assert told == [(10, "loss 3.00  7 clips/s  held-out R@5 0.250 (chance 0.050)")]
    line = json.dumps({"step": 20, "loss/total": 2.0, "speed/clips_per_s": None}) + "\n"
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(line[:15])
        file.flush()
        watch.look()
        file.write(line[15:])
    assert len(told) == 1, "a line that is not whole is not told"
    watch.look()
    assert told[1:] == [(20, "loss 2.00  0 clips/s  held-out R@5 0.250 (chance 0.050)")]
    log.close()
    continued = MetricsLog(tmp_path / "metrics.jsonl", after=10)
    continued.write(11, {"loss/total": 1.0, "speed/clips_per_s": 7.0})
    continued.close()
    watch.look()
    assert [done for done, _ in told] == [10, 20, 10, 11], "written anew, it is read anew"


def picture(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def test_curves_are_a_small_picture_in_markdown() -> None:
    text = curves(RECORDS)
    assert text.startswith("Step 8\n") and len(text) < 100_000
    found = re.search(r"!\[[^\]]+\]\(data:image/png;base64,([A-Za-z0-9+/=]+)\)", text)
    assert found
    pixels = picture(base64.b64decode(found[1]))
    other = picture(base64.b64decode(re.search(r"base64,([^)]*)", curves(RECORDS[:5]))[1]))  # type: ignore[index]
    assert pixels.shape[:2] == (224, 630) and not np.array_equal(pixels, other)


def test_every_number_is_in_the_monitors_picture(tmp_path: Path) -> None:
    """Nulls too, and a run that has told nothing yet."""
    path = draw_monitor(tmp_path, [*RECORDS, {"step": 9, "loss/total": None, "more/of_it": 1.0}])
    assert path == tmp_path / "monitor.png" and picture(path.read_bytes()).std() > 5
    draw_monitor(tmp_path, [])


def test_ranks_are_given_the_same_options() -> None:
    options = {"objective.tau": 0.1, "optimiser.cosine": True, "steps": 7, "split": "", "objective.selector": "fifo"}
    given = _arguments(["2=a", "b"], "run", "demo", options)
    assert given[:7] == ["pretrain", "2=a", "b", "--out", "run", "--recipe", "demo"]
    texts = dict(part.split("=", 1) for part in given[8::2])
    assert change(recipe("demo"), texts) == change(recipe("demo"), options)
