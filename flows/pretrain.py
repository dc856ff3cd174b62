"""The `pretrain` flow: a data set in, a run's folder out. Running it again continues it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from cmacc.flows.progress import progress, table
from cmacc.flows.tracked import tracked
from cmacc.train.config import change, recipe
from cmacc.train.picture import draw_run
from cmacc.train.pretrain import final_numbers
from cmacc.train.pretrain import pretrain as train_loop

log = logging.getLogger(__name__)


@tracked("pretrain")
def pretrain(data: str, out: str, recipe_name: str = "small", options: dict[str, Any] | None = None) -> dict[str, Any]:
    """Pretrain on the data set `data` in the folder `out`.

    recipe_name: `paper` or `small`. options: changes to the recipe by dotted name, e.g. `{"objective.tau": 0.1}`. Returns
    the last held-out numbers and the mean speed. Raises ValueError with one sentence for a wrong option.
    """
    config = change(recipe(recipe_name), options or {})
    with progress("pretrain", total=config.steps) as tell:
        note = ""

        def report(step: int, facts: dict[str, float]) -> None:
            nonlocal note
            if "held_out/R@5" in facts:
                note = f"held-out R@5 {facts['held_out/R@5']:.3f} (chance {facts['held_out/chance_R@5']:.3f})"
            if "loss/total" in facts:
                tell(step, f"loss {facts['loss/total']:.2f}  {facts['speed/clips_per_s']:.0f} clips/s  {note}")

        train_loop(data, Path(out), config, report)
    numbers = final_numbers(Path(out))
    log.info("picture: %s", draw_run(Path(out)))
    table("pretrain-numbers", [{"number": k, "value": v} for k, v in numbers.items()])
    return numbers
