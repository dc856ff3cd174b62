"""The commands that say what trained encoders can do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from cmacc.flows.console import app, call_flow, escape, out_console, parse_options, print_table

_FILES, _CLIPS = "Of files: esc50, ucf101, hmdb51, folder, sounds", "Of clips: retrieval"
_NAMED = 5


@app.command(epilog="Example: [bold]cmacc evaluate runs/first --on esc50:data/ESC-50 --on retrieval:data/audioset[/bold]")
def evaluate(
    model: Annotated[str, typer.Argument(help="A run's folder, a checkpoint or an export.")],
    on: Annotated[
        list[str] | None,
        typer.Option(help="esc50:DIR, ucf101:DIR, hmdb51:DIR, folder:DIR, sounds:DIR, retrieval:DATASET; may be repeated."),
    ] = None,
    protocol: Annotated[
        list[str] | None, typer.Option(help="svm, logistic or knn; may be repeated. Default: all.", rich_help_panel=_FILES)
    ] = None,
    views: Annotated[int, typer.Option(help="Views of each file or clip, evenly spaced.")] = 10,
    crops: Annotated[int, typer.Option(help="Crops of each view of a video: 1 or 3.", rich_help_panel=_FILES)] = 1,
    baselines: Annotated[
        bool,
        typer.Option("--baselines/--no-baselines", help="Compare with an untrained encoder and with simple statistics."),
    ] = True,
    finetune: Annotated[bool, typer.Option("--finetune", help="Also train the encoder further.", rich_help_panel=_FILES)] = False,
    options: Annotated[
        list[str] | None,
        typer.Option("--set", help="Of fine-tuning, as finetune.epochs=20; repeatable.", rich_help_panel=_FILES),
    ] = None,
    split: Annotated[str, typer.Option(help="Clips that are looked for.", rich_help_panel=_CLIPS)] = "eval",
    gallery: Annotated[
        str, typer.Option(help="Split among which clips look for their class; '' for none.", rich_help_panel=_CLIPS)
    ] = "train",
    clips: Annotated[int, typer.Option(help="At most so many of each split.", rich_help_panel=_CLIPS)] = 1000,
    out: Annotated[str | None, typer.Option(help="Folder for JSON and pictures. Default: evaluation/ in a run's folder.")] = None,
    cache: Annotated[str | None, typer.Option(help="Folder for features. Default: features.zarr beside the results.")] = None,
    batch: Annotated[int, typer.Option(help="Views at once.")] = 32,
) -> None:
    """Score trained encoders beside baselines and chance: probes on labelled files, and retrieval among clips."""
    from cmacc.flows.evaluate import evaluate as flow
    from cmacc.flows.scoring import scores_table
    from cmacc.train.evaluation.results import Result

    scores = call_flow(
        flow, model, on=on or [], split=split, gallery=gallery, clips=clips, protocols=protocol, views=views, crops=crops,
        baselines=baselines, finetune=finetune, options=parse_options(options), out=out, cache=cache, batch=batch,
    )  # fmt: skip
    results = [Result(**each) for each in scores["results"]]
    heads, rows = scores_table(results)
    print_table(f"{model}, step {scores['step']}", rows, heads)
    for line in _remarks(results):
        out_console.print(escape(line), highlight=False, soft_wrap=True)
    out_console.print(f"written: {', '.join(scores['written'])}", highlight=False, soft_wrap=True)


def _remarks(results: Sequence[Any]) -> list[str]:
    """What was left out and what is unusual, once for each task."""
    lines = []
    for task in dict.fromkeys(result.task for result in results):
        left_out = {name: why for r in results if r.task == task for name, why in r.left_out.items()}
        if left_out:
            named = [f"{name} ({why})" for name, why in list(left_out.items())[:_NAMED]]
            more = f" and {len(left_out) - _NAMED} more" if len(left_out) > _NAMED else ""
            lines.append(f"{task}: {len(left_out)} left out: {', '.join(named)}{more}")
        lines += [f"{task}: {note}" for note in dict.fromkeys(note for r in results if r.task == task for note in r.notes)]
    return lines
