"""The main job, whole, on the sample world: what `make demo` runs."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cmacc.flows.evaluate import evaluate
from cmacc.flows.ingest import ingest
from cmacc.flows.pretrain import pretrain
from cmacc.flows.progress import progress
from cmacc.ingest.world import WorldConfig, render_world, serve

Say = Callable[[str], None]
PICTURES: dict[str, Any] = {"profile_name": "h264", "short_side": 72, "fps": 16, "gop": 8}
"""The demo looks at pictures of 56 pixels: smaller ones at rest decode faster."""


def demo(out: Path, config: WorldConfig, options: dict[str, Any], say: Say) -> dict[str, Any]:
    """Everything goes into `out`: `world/`, `data/`, and the run itself. Running it again continues. Returns the scores.

    config: of the world; its seed is the run's too. options: changes to the recipe `demo` by dotted name.
    """
    began = time.monotonic()
    cores = os.cpu_count() or 1

    say("[bold]1/4[/bold] rendering the sample world")
    with progress("sample-world", total=0) as tell:
        world = render_world(out / "world", config, cores, on_progress=lambda done, files: tell(done, "files", files))
    say(f"[bold]2/4[/bold] ingesting {world.clips} clips of {world.files} videos, through yt-dlp from 127.0.0.1")
    with serve(world.root) as url:
        counts = ingest(
            [f"train={world.train_manifest}", f"eval={world.eval_manifest}"],
            str(out / "data"),
            url_template=f"{url}/media/{{id}}.mp4",
            workers=cores,
            shard_mb=8,
            **PICTURES,
        )
    say(f"    {counts['done']} of {counts['rows']} clips are in {out / 'data'} after {time.monotonic() - began:.0f} s")
    say("[bold]3/4[/bold] pretraining with active selection")
    numbers = pretrain(str(out / "data"), str(out), recipe_name="demo", options={"seed": config.seed, **options})
    say("[bold]4/4[/bold] evaluating on held-out clips")
    scores = evaluate(str(out), [f"retrieval:{out / 'data'}"], views=1)
    say(summary(out, scores["retrieval"], numbers, time.monotonic() - began))
    return scores


def summary(out: Path, found: dict[str, Any], numbers: dict[str, Any], seconds: float) -> str:
    """What the demo made and how good it is, for the terminal. found: scores of retrieval; numbers: of the pretraining."""
    lines = [
        f"[bold]done in {seconds:.0f} s[/bold]; everything is in {out}:",
        f"    data set     {out / 'data'}",
        f"    checkpoint   {out / 'checkpoints'}",
        f"    metrics      {out / 'metrics.jsonl'}   (tensorboard --logdir {out / 'tensorboard'})",
        f"    scores       {out / 'evaluation'}",
        f"    picture      {out / 'picture.png'}   (all numbers: {out / 'monitor.png'})",
        f"retrieval among {found['clips']} held-out clips, mean of both directions:",
        *(f"    {name:<38} {found[key]:.3f}   chance {found[f'chance_{key}']:.3f}" for name, key in _SHOWN),
        f"pretraining: {numbers['speed/clips_per_s']:.1f} clips/s, "
        f"{numbers['speed/waiting']:.1%} of the time spent waiting for data",
    ]
    return "\n".join(lines)


_SHOWN = (
    ("R@1", "R@1"),
    ("R@5", "R@5"),
    ("class of the clip found first", "class@1"),
    ("R@1 among clips of the same class", "same_class_R@1"),
    ("R@5 among clips of the same class", "same_class_R@5"),
)
