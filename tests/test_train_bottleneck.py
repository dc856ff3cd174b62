"""What holds the loader up: the stage that is made slow is the one that is named."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from train_data import LOADER, VIEW, clips, write_dataset

from cmacc.train.loading.bottleneck import ADVICE, STAGES, find_bottleneck
from cmacc.train.loading.reader import ViewReader
from cmacc.train.loading.sampler import Source


@pytest.mark.parametrize(("stage", "method"), [*zip(STAGES, ("look_up", "read", "decode", "make"), strict=True)])
def test_the_slow_stage_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, method: str) -> None:
    """A tenth of a second more for each call, over several batches: one may be ready by chance."""
    data, whole = write_dataset(tmp_path / "data", clips()[:8]), getattr(ViewReader, method)

    def slow(self: ViewReader, *args: Any, **options: Any) -> Any:
        time.sleep(0.1)
        return whole(self, *args, **options)

    monkeypatch.setattr(ViewReader, method, slow)
    told: list[int] = []
    found = find_bottleneck([Source(data)], VIEW, LOADER, seconds=0.3, on_progress=told.append)
    assert told == list(range(1, 10))
    assert set(found.alone) == set(found.without) == set(STAGES)
    assert min(found.whole, *found.alone.values(), *found.without.values()) > 0
    assert found.stage == stage
    assert found.sentence().endswith(f"To speed it up, {ADVICE[stage]}.")
    assert f"'{stage}' holds it up" in found.sentence()
