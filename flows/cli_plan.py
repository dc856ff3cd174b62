"""The command that tells what a job will take, before it is begun."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from cmacc.flows.console import app, out_console, parse_options, print_table

if TYPE_CHECKING:
    from cmacc.flows.estimate import Line

_DATA, _TRAINING, _PRICES = "The clips", "The training", "Prices, in any currency"


@app.command(
    epilog="Example: [bold]cmacc plan --clips 2000000 --recipe paper --gpu h100 --mfu 0.3 "
    "--price-gb-month 0.02 --price-egress-gb 0.09 --price-gpu-hour 3[/bold]"
)
def plan(
    clips: Annotated[int, typer.Option(help="That the data set shall have.", rich_help_panel=_DATA)],
    gpu: Annotated[str, typer.Option(help="Its name, as h100 or a100.", rich_help_panel=_TRAINING)],
    recipe: Annotated[str, typer.Option(help="As `cmacc recipes` lists them.", rich_help_panel=_TRAINING)] = "paper",
    options: Annotated[
        list[str] | None, typer.Option("--set", help="name=value of the recipe, e.g. steps=50000.", rich_help_panel=_TRAINING)
    ] = None,
    epochs: Annotated[float | None, typer.Option(help="Instead of the recipe's steps.", rich_help_panel=_TRAINING)] = None,
    gpus: Annotated[int, typer.Option(help="That train together.", rich_help_panel=_TRAINING)] = 1,
    mfu: Annotated[
        float | None,
        typer.Option(help="Share of the GPU's peak that is reached: `speed/mfu` of a run's log.", rich_help_panel=_TRAINING),
    ] = None,
    profile: Annotated[str, typer.Option(help="h264, h264-dense, mjpeg or vp9.", rich_help_panel=_DATA)] = "h264",
    clip_s: Annotated[float, typer.Option(help="Seconds a clip.", rich_help_panel=_DATA)] = 10.0,
    clips_per_video: Annotated[float, typer.Option(help="Clips that one source video gives.", rich_help_panel=_DATA)] = 1.0,
    videos_per_hour: Annotated[
        float | None, typer.Option(help="The site's budget, instead of what is said of YouTube's.", rich_help_panel=_DATA)
    ] = None,
    cores: Annotated[int, typer.Option(help="That cut and encode.", rich_help_panel=_DATA)] = 2,
    price_gb_month: Annotated[float | None, typer.Option(help="Of a GB stored for a month.", rich_help_panel=_PRICES)] = None,
    price_egress_gb: Annotated[
        float | None, typer.Option(help="Of a GB read out of the bucket.", rich_help_panel=_PRICES)
    ] = None,
    price_gpu_hour: Annotated[float | None, typer.Option(help="Of an hour of one GPU.", rich_help_panel=_PRICES)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """What a job will take: time of the ingest, storage, traffic, GPU hours, their cost; every line says what it rests on."""
    from cmacc.flows.estimate import CloudPrices, Job, estimate
    from cmacc.flows.rates import measured
    from cmacc.train import config as configs

    job = Job(clips, gpu, profile, clip_s, clips_per_video, videos_per_hour, cores, gpus, epochs, mfu)
    config = configs.change(configs.recipe(recipe), parse_options(options))
    lines = estimate(job, config, CloudPrices(price_gb_month, price_egress_gb, price_gpu_hour), measured())
    if as_json:
        print(json.dumps([asdict(line) for line in lines], indent=2))
        return
    sources = list(dict.fromkeys(line.source for line in lines))
    rows = {line.what: (_amount(line), _cost(line), line.basis, str(1 + sources.index(line.source))) for line in lines}
    print_table(f"{clips:,} clips, {recipe}, {gpu}", rows, ("how much", "cost", "basis", "source"))
    for number, source in enumerate(sources, 1):
        out_console.print(f"{number:2}  {source}", highlight=False, soft_wrap=True, markup=False)


def _amount(line: Line) -> str:
    """`1.35 TB`, `278 days`, `12,800,000 clips`."""
    if line.amount is None:
        return "?"
    if line.unit == "h":
        from cmacc.flows.progress import in_time

        return in_time(3600 * line.amount)
    amount, unit = (line.amount / 1000, "TB") if line.unit == "GB" and line.amount >= 1000 else (line.amount, line.unit)
    return f"{amount:,.0f} {unit}" if amount >= 1000 else f"{amount:.3g} {unit}"


def _cost(line: Line) -> str:
    if line.cost is None:
        return ""
    return f"{line.cost:,.2f}{' a month' if line.what == 'stored' else ''}"
