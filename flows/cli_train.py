"""The commands that train: recipes, pretraining, looking again at what failed, what holds the loader up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from cmacc.flows import torchrun
from cmacc.flows.console import app, call_flow, out_console, parse_options, print_table
from cmacc.shards.options import meanings

_BEFORE, _AFTER = 6, 3
"""Layers shown around the first that is not finite."""


@app.command(epilog="Example: [bold]cmacc recipes small-cpu --set train.batch=64[/bold]")
def recipes(
    name: Annotated[str | None, typer.Argument(help="One of them, to see all of its options.")] = None,
    options: Annotated[list[str] | None, typer.Option("--set", help="name=value, to see what comes of it.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """The recipes of `cmacc pretrain`, or all options of one, with their values and what they are."""
    from cmacc.train import config as configs

    if name is None:
        print_table("recipes", {name: (make.__doc__ or "").strip() for name, make in configs.RECIPES.items()})
        return
    config = configs.to_json(configs.change(configs.recipe(name), parse_options(options)))
    if as_json:
        print(json.dumps(config, indent=2))
        return
    told = meanings(configs.PretrainConfig)
    rows = {option: (str(value), told[option].partition(". ")[0]) for option, value in configs.flatten(config).items()}
    print_table(name, rows, ("value", "what it is"), right=False)


@app.command(epilog="Example: [bold]cmacc pretrain data/audioset --out runs/first --recipe paper --set train.batch=64[/bold]")
def pretrain(
    data: Annotated[
        list[str],
        typer.Argument(help="A data set: folder or fsspec URL. Several are mixed, by weight when given as WEIGHT=DATA."),
    ],
    out: Annotated[Path, typer.Option(help="The run's folder; an existing one is continued.")],
    recipe: Annotated[str, typer.Option(help="As `cmacc recipes` lists them.")] = "small-cpu",
    options: Annotated[
        list[str] | None, typer.Option("--set", help="name=value, by dotted name; may be given several times.")
    ] = None,
    ranks: Annotated[
        int, typer.Option(help="Processes of this machine that train together, by torchrun; 0: one for each GPU.")
    ] = 1,
) -> None:
    """Pretrain with CM-ACC. The same command continues a run, with the very next clip.

    On several machines: torchrun … -m cmacc pretrain …
    """
    from cmacc.flows.pretrain import pretrain as flow

    if torchrun.rank() is not None:
        numbers = flow.fn(data, str(out), recipe_name=recipe, options=parse_options(options))
        if not numbers:
            return
    else:
        numbers = call_flow(flow, data, str(out), recipe_name=recipe, options=parse_options(options), ranks=ranks)
    print_table(f"pretrain: {out}", {name: value for name, value in numbers.items() if name.count("/") < 2})
    out_console.print(f"picture: {out / 'picture.png'}", highlight=False)


@app.command(epilog="Example: [bold]cmacc replay runs/first/failed/step-00012000[/bold]")
def replay(
    failed: Annotated[Path, typer.Argument(help="A step's folder in RUN/failed.")],
    checkpoint: Annotated[str, typer.Option(help="Whose weights; default: those kept with the batch, or the run's latest.")] = "",
    whole: Annotated[bool, typer.Option("--all", help="Every layer, not those around the first alone.")] = False,
) -> None:
    """Run a batch that failed again, layer by layer, and name the first input, layer, loss or gradient that is not finite."""
    from cmacc.train.running.replay import replay as look_again

    found = look_again(failed, checkpoint)
    place = found.looks.index(found.first) if found.first else len(found.looks)
    shown = found.looks if whole else found.looks[max(0, place - _BEFORE) : place + 1 + _AFTER]
    rows = {look.where: ("yes" if look.finite else "NO", f"{look.largest:.3g}") for look in shown}
    print_table(str(failed), rows, ("finite", "largest of the finite"))
    out_console.print(found.sentence(), highlight=False, soft_wrap=True)


bench = typer.Typer(help="Measure what a part of the work can do here, on your data.", no_args_is_help=True)
app.add_typer(bench, name="bench")


@bench.command("loader", epilog="Example: [bold]cmacc bench loader data/audioset --recipe paper[/bold]")
def bench_loader(
    data: Annotated[
        list[str],
        typer.Argument(help="A data set: folder or fsspec URL. Several are mixed, by weight when given as WEIGHT=DATA."),
    ],
    split: Annotated[str | None, typer.Option(help="Clips of this split alone.")] = None,
    recipe: Annotated[str, typer.Option(help="Whose views and batches: as `cmacc recipes` lists them.")] = "paper",
    options: Annotated[list[str] | None, typer.Option("--set", help="name=value, e.g. loader.batch=32 or view.blur=0.5.")] = None,
    seconds: Annotated[float, typer.Option(help="For each of nine measurements.", min=0.1)] = 3.0,
) -> None:
    """Clips a second of the training loader, stage by stage, and what holds it up."""
    from cmacc.flows.progress import progress
    from cmacc.train import config as configs
    from cmacc.train.loading.bottleneck import STAGES, find_bottleneck
    from cmacc.train.loading.sampler import open_sources

    config = configs.change(configs.recipe(recipe), parse_options(options))
    with progress("bench loader", total=1 + 2 * len(STAGES)) as tell:
        found = find_bottleneck(
            open_sources(data, split), config.view, config.loader, seconds=seconds, on_progress=lambda done: tell(done, "")
        )
    rows = {stage: (f"{found.alone[stage]:.0f}", f"{found.without[stage]:.0f}") for stage in STAGES}
    print_table("clips/s of the loader", {**rows, "all of it": (f"{found.whole:.0f}", "")}, ("alone", "the rest without it"))
    out_console.print(found.sentence(), highlight=False, soft_wrap=True)
