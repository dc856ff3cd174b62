"""The study: its runs are pure functions of their seeds, and what it reports is what its raw results say."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from train_data import clips as make_clips
from train_data import write_dataset

STUDY = Path(__file__).resolve().parents[1] / "infra" / "study"


@pytest.fixture(scope="module")
def study() -> Iterator[ModuleType]:
    """Its scripts, which import each other by bare names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(STUDY))
        import clips
        import measures
        import report
        import run
        import study

        study.clips, study.run, study.report, study.measures = clips, run, report, measures  # type: ignore[attr-defined]
        yield study


@pytest.fixture(scope="module")
def decoded(study: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """16 clips to train on, 6 held out, of one second at least."""
    home = tmp_path_factory.mktemp("study")
    study.clips.keep(write_dataset(home / "data", make_clips()), 2.0, home / "decoded")
    return study.clips.open_clips(home / "decoded")


def tiny(study: Any, **objective: Any) -> Any:
    given = {"dictionary": 12, "candidates": 16, "tau": 0.1, **objective}
    return study.run.Setting(steps=6, batch=4, warmup=2, scored=3, objective=given)


def test_an_epoch_has_every_clip_once_and_the_seed_decides_the_order(study: Any, decoded: Any) -> None:
    def places(seed: int, steps: range, batch: int) -> list[int]:
        return np.concatenate([decoded.order(seed, step, batch)[0] for step in steps]).tolist()

    first = places(1, range(4), 4)
    assert sorted(first) == decoded.train.tolist()
    assert first == places(1, range(2), 8), "whatever the batch"
    assert first != places(1, range(4, 8), 4), "another order in the next epoch"
    assert first != places(2, range(4), 4)


def test_views_without_draws_are_the_middle_of_what_the_loader_decoded(study: Any, decoded: Any) -> None:
    batch = decoded.views(decoded.held_out, None)
    view = study.clips.VIEW
    assert batch.video.shape == (6, 3, view.frames, view.size, view.size)
    assert batch.audio.shape == (6, 1, view.n_mels, view.mel_steps)
    kept = decoded.pictures[decoded.held_out[0]]
    margin, late = study.clips.MARGIN // 2, (len(kept) - 24) // 2
    wanted = (kept[late : late + 24 : 3, margin:-margin, margin:-margin].astype(np.float32) - 0.45 * 255) / (0.225 * 255)
    np.testing.assert_allclose(batch.video[0].permute(1, 2, 3, 0).numpy(), wanted, atol=1e-5)


@pytest.mark.parametrize("objective", [{"selector": "fifo"}, {}, {"pool": "fresh", "fresh": 2}], ids=["queue", "active", "fresh"])
def test_a_run_is_a_pure_function_of_its_seed(study: Any, decoded: Any, objective: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    given = tiny(study, **objective)
    (first, _), (again, _), (other, _) = (study.run.train(decoded, given, seed) for seed in (1, 1, 2))
    for result in (first, again, other):
        del result["seconds"]
    assert first == again
    assert first["end"] != other["end"]
    assert [score["step"] for score in first["scores"]] == [0, 3, 6]
    assert json.loads(json.dumps(first)) == first


def test_pairs_and_their_interval(study: Any) -> None:
    mean, half, wins, seeds = study.measures.paired({1: 0.5, 2: 0.7, 3: 0.6, 9: 1.0}, {1: 0.4, 2: 0.5, 3: 0.6, 4: 0.0})
    assert (wins, seeds) == (2, 3)
    assert mean == pytest.approx(0.1)
    assert half == pytest.approx(4.302653 * 0.1 / 3**0.5)


def test_the_readme_says_what_the_raw_results_say(study: Any, tmp_path: Path) -> None:
    """Tables and pictures are made anew from the results that are in the repository; nothing is trained."""
    shutil.copy(STUDY / "README.md", tmp_path)
    before = (tmp_path / "README.md").read_text()
    study.report.write_report(STUDY / "results", tmp_path)
    assert (tmp_path / "README.md").read_text() == before
    assert {path.name for path in tmp_path.glob("*.png")} == {path.name for path in STUDY.glob("*.png")}
