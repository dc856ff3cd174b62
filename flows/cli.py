"""The `cmacc` command: every flow and every tool by hand, no server needed."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.logging import RichHandler
from typer.models import CommandInfo

from cmacc.flows import (
    cli_data,  # noqa: F401  its commands join the app
    cli_encoders,  # noqa: F401
    cli_evaluate,  # noqa: F401
    cli_plan,  # noqa: F401
    cli_report,  # noqa: F401
    cli_server,  # noqa: F401
    cli_train,  # noqa: F401
    settings,
    torchrun,
)
from cmacc.flows.console import app, call_flow, err_console, escape, out_console, parse_options, print_table

_AFTER_RANK_0_S = 3.0
"""What all ranks refuse, rank 0 says; by then torchrun has ended the others. What one of them alone refuses, it says."""
_OF_TRAIN = ("torch", "torchaudio", "torchvision", "nvidia", "matplotlib", "safetensors", "scipy", "sklearn")
"""What the extra `train` brings; an image that ingests goes without."""
_LISTS, _CLIPS, _SITES, _WORK = "What the lists mean", "What a clip is", "How sites are treated", "How the work is done"


@app.callback()
def _set_up(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say more, Prefect's own messages too.")] = False,
) -> None:
    settings.apply(verbose)
    if torchrun.attended():  # the flow reads the lines
        logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s\t%(message)s")
    else:
        handler = RichHandler(console=err_console, show_path=False, show_time=False, markup=False)
        logging.basicConfig(level=logging.WARNING, handlers=[handler], format="%(message)s")
    # of several ranks one speaks; the others warn
    logging.getLogger("cmacc").setLevel(logging.DEBUG if verbose else logging.WARNING if torchrun.rank() else logging.INFO)


def main() -> None:
    """Entry point: a refusal is one sentence on the error stream and exit status 1."""
    # SIGTERM must run what cleans up: children of an ingest, a temporary Prefect server.
    signal.signal(signal.SIGTERM, lambda *_: _stop())
    try:
        app()
    except SystemExit as ended:
        if ended.code == 130:  # Ctrl-C, as typer passes it on
            _hush()
            err_console.print("stopped; the same command continues")
        raise
    except Exception as error:
        stopped = type(error).__name__ in ("Preempted", "Stopped")
        if not stopped and not _is_refusal(error):
            raise
        if torchrun.rank():
            time.sleep(_AFTER_RANK_0_S)
        err_console.print(f"[red]cmacc:[/red] {escape(_sentence(error))}", soft_wrap=True, highlight=False)
        sys.exit(torchrun.STOPPED if stopped else 1)


def _stop() -> None:
    _hush()
    sys.exit(143)


def _hush() -> None:
    """Who stops the work need not read which tasks the event loops of zarr and fsspec leave undone."""
    logging.getLogger("asyncio").disabled = True


def _sentence(error: Exception) -> str:
    """An error's own words, but for what the operating system says of a file, or of memory: there the mend is missing."""
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed, and what trains needs it; pip install 'cmacc[train]', or take the trainer's image"
    if isinstance(error, MemoryError):
        said = f"there is not enough memory ({str(error) or 'nothing is left'})"
        return f"{said}; give smaller numbers, as of loader.batch, loader.ahead, loader.streams and view.frames"
    if not isinstance(error, OSError) or error.errno is None:
        bare = isinstance(error, OSError) and ";" not in str(error)  # what a bucket says
        return f"{error}; check the address and the right to read and write there" if bare else str(error)
    where = f" at {error.filename}" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no room is left on the disk{where}; free some, and the same command continues: what was committed stays"
    return f"{error.strerror}{where}; check that the path is right and that you may read and write there"


def _is_refusal(error: Exception) -> bool:
    """Whether an error's own sentence tells the user what to mend; anything else is a fault of ours and keeps its traceback."""
    from cmacc.ingest import IngestFailure
    from cmacc.shards.errors import DatasetError

    if isinstance(error, (ValueError, OSError, MemoryError, FloatingPointError, IngestFailure, DatasetError)):
        return True
    if isinstance(error, ModuleNotFoundError):
        return (error.name or "").partition(".")[0] in _OF_TRAIN
    return type(error).__name__ in ("CheckpointError", "ParameterTypeError")


@app.command(
    "sample-world",
    epilog="Example: [bold]cmacc sample-world runs/world --clips 200 --eval-clips 60 --serve[/bold]",
)
def sample_world(
    out: Annotated[Path, typer.Argument(help="Folder for the media files and clip lists.")],
    clips: Annotated[int, typer.Option(help="Training clips.")] = 1000,
    eval_clips: Annotated[int, typer.Option(help="Held-out clips.")] = 240,
    clip_s: Annotated[float, typer.Option(help="Seconds a clip.")] = 2.0,
    imbalance: Annotated[float, typer.Option(help="Zipf exponent of the training classes' frequencies; 0 is equal.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
    workers: Annotated[int | None, typer.Option(help="Processes; default: one a core.")] = None,
    serve: Annotated[bool, typer.Option(help="Then serve the files on 127.0.0.1 until Ctrl-C.")] = False,
    port: Annotated[int, typer.Option(help="Port to serve on; 0 takes a free one.")] = 0,
) -> None:
    """Render the sample world: seeded videos of moving, sounding things, with clip lists in AudioSet's form."""
    from cmacc.flows.progress import progress
    from cmacc.ingest.world import WorldConfig, render_world
    from cmacc.ingest.world import serve as serve_folder

    config = WorldConfig(clips=clips, eval_clips=eval_clips, clip_s=clip_s, imbalance=imbalance, seed=seed)
    with progress("sample-world", total=0) as tell:
        world = render_world(out, config, workers, on_progress=lambda done, files: tell(done, "files", files))
    print_table(
        "sample world",
        {"files": world.files, "clips": world.clips, "training list": world.train_manifest, "held-out list": world.eval_manifest},
    )
    if serve:
        import threading

        with serve_folder(world.root, port) as url:
            out_console.print(f"serving {url}/media/; Ctrl-C ends it", highlight=False)
            threading.Event().wait()


@app.command(
    epilog="Example: [bold]cmacc ingest train=balanced_train_segments.csv eval=eval_segments.csv --out data/audioset "
    "--opt-out opt-out.txt[/bold]"
)
def ingest(
    manifests: Annotated[
        list[str],
        typer.Argument(
            help="Clip lists, as PATH or SPLIT=PATH: AudioSet, VGGSound, Kinetics, ACAV100M, HowTo100M, "
            "CSV, TSV, JSONL, Parquet, a folder or a media file."
        ),
    ],
    out: Annotated[str, typer.Option(help="Folder of the data set; an existing one is continued.")],
    url_template: Annotated[
        str | None, typer.Option(help="Address of a YouTube id, with {id} in it.", rich_help_panel=_LISTS)
    ] = None,
    manifest_format: Annotated[
        str, typer.Option("--format", help="Form of the lists, if it is not to be recognised.", rich_help_panel=_LISTS)
    ] = "auto",
    label_column: Annotated[
        str, typer.Option(help="Column of a table that holds the label, if none is named so.", rich_help_panel=_LISTS)
    ] = "",
    captions: Annotated[str, typer.Option(help="HowTo100M's caption.json.", rich_help_panel=_LISTS)] = "",
    segment: Annotated[
        float | None,
        typer.Option(help="Cut the captioned part of a video into clips of so many seconds.", rich_help_panel=_LISTS),
    ] = None,
    allow_private: Annotated[
        bool, typer.Option(help="Take file: addresses and those of this machine and of private networks.", rich_help_panel=_LISTS)
    ] = False,
    opt_out: Annotated[
        str, typer.Option(help="File of ids, addresses or keys that are never taken, one a line.", rich_help_panel=_LISTS)
    ] = "",
    profile: Annotated[str, typer.Option(help="h264, h264-dense, mjpeg or vp9.", rich_help_panel=_CLIPS)] = "h264",
    short_side: Annotated[int | None, typer.Option(help="Pixels of the shorter side.", rich_help_panel=_CLIPS)] = None,
    fps: Annotated[int | None, typer.Option(help="Frames per second.", rich_help_panel=_CLIPS)] = None,
    gop: Annotated[int | None, typer.Option(help="Frames from keyframe to keyframe.", rich_help_panel=_CLIPS)] = None,
    audio: Annotated[str | None, typer.Option(help="flac or opus (48 kHz).", rich_help_panel=_CLIPS)] = None,
    audio_rate: Annotated[int | None, typer.Option(help="Hz of FLAC, 16000 by default.", rich_help_panel=_CLIPS)] = None,
    shard_mb: Annotated[int, typer.Option(help="MiB a shard.", rich_help_panel=_CLIPS)] = 256,
    videos_per_hour: Annotated[
        float | None,
        typer.Option(help="Of each site; 0: no limit. Left out: 300 for YouTube, no limit elsewhere.", rich_help_panel=_SITES),
    ] = None,
    when_parked: Annotated[
        str, typer.Option(help="When all that is left is at a site that has had enough: stop, or wait.", rich_help_panel=_SITES)
    ] = "stop",
    cookies: Annotated[str, typer.Option(help="Netscape cookie file for the download.", rich_help_panel=_SITES)] = "",
    proxy: Annotated[str, typer.Option(help="Proxy for the download.", rich_help_panel=_SITES)] = "",
    retry: Annotated[
        list[str] | None, typer.Option(help="Try failures of these causes again now, as network,timeout.", rich_help_panel=_WORK)
    ] = None,
    workers: Annotated[int, typer.Option(help="Source videos worked on at once.", rich_help_panel=_WORK)] = 2,
    timeout: Annotated[float, typer.Option(help="Seconds for one source video.", rich_help_panel=_WORK)] = 600.0,
    ledger: Annotated[
        str, typer.Option(envvar="CMACC_LEDGER", help="postgresql://… instead of a file in OUT.", rich_help_panel=_WORK)
    ] = "",
    parts: Annotated[
        int, typer.Option(help="Share the work out to so many flow runs on a Prefect work pool.", rich_help_panel=_WORK)
    ] = 1,
    dask: Annotated[str, typer.Option(help="Address of a Dask scheduler that does the work.", rich_help_panel=_WORK)] = "",
    options: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="name=value, e.g. fetch.short_side=720 or checks.near_duplicate=filter.", rich_help_panel=_WORK
        ),
    ] = None,
) -> None:
    """Download and transcode clips into WebDataset shards. The same command continues a run."""
    from cmacc.flows.ingest import ingest as flow

    arguments: dict[str, Any] = {
        "url_template": url_template,
        "manifest_format": manifest_format,
        "label_column": label_column,
        "captions": captions,
        "segment_s": segment,
        "profile_name": profile,
        "short_side": short_side,
        "fps": fps,
        "gop": gop,
        "audio": audio,
        "audio_rate": audio_rate,
        "shard_mb": shard_mb,
        "workers": workers,
        "retry": [cause for text in retry or () for cause in text.split(",")],
        "videos_per_hour": videos_per_hour,
        "when_parked": when_parked,
        "cookies": cookies,
        "proxy": proxy,
        "opt_out": opt_out,
        "allow_private": allow_private,
        "timeout_s": timeout,
        "ledger": ledger,
        "parts": parts,
        "dask": dask,
        "options": parse_options(options),
    }
    counts = call_flow(flow, manifests, out, tracked=bool(dask), **arguments)
    print_table(
        f"ingest: {out}",
        {**{k: v for k, v in counts.items() if k != "causes"}, **{f"failed: {k}": v for k, v in counts["causes"].items()}},
    )


@app.command(epilog="Example: [bold]cmacc status data/audioset --price-hour 0.40 --price-gb-month 0.02[/bold]")
def status(
    data: Annotated[str, typer.Argument(help="The folder that `cmacc ingest` writes, at work or not.")],
    ledger: Annotated[str, typer.Option(envvar="CMACC_LEDGER", help="The ledger's URL, if it has moved.")] = "",
    price_hour: Annotated[float, typer.Option(help="Of an hour of the machine.")] = 0.0,
    price_gb_in: Annotated[float, typer.Option(help="Of a GB downloaded.")] = 0.0,
    price_gb_month: Annotated[float, typer.Option(help="Of a GB stored for a month.")] = 0.0,
    rows: Annotated[Path | None, typer.Option(help="Also write every row with its state, cause and detail, CSV.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Where an ingest stands: done, pending, failed by cause, speed, bytes, time left, cost of 1,000 clips."""
    from cmacc.flows.status import Prices
    from cmacc.flows.status import status as read

    lines = read(data, ledger, Prices(price_hour, price_gb_in, price_gb_month), rows)
    if as_json:
        print(json.dumps({name.strip(): text for name, text in lines.items()}, indent=2))
    else:
        print_table(data, lines)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog="Example: [bold]cmacc run ingest --watch[/bold] does prefect deployment run ingest/local --watch",
)
def run(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="A flow (ingest, reshard, pretrain, evaluate) or FLOW/DEPLOYMENT.")],
) -> None:
    """Run a deployment on a Prefect server, by the flow's bare name; further options go to `prefect deployment run`."""
    from cmacc.flows.deployments import resolve, run_deployment

    raise typer.Exit(run_deployment(resolve(name), context.args))


@app.command(epilog="Example: [bold]cmacc demo runs/demo[/bold]")
def demo(
    out: Annotated[Path, typer.Argument(help="Folder for everything the demo makes.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Of the world and of the run.")] = 0,
    clips: Annotated[int, typer.Option(help="Training clips.")] = 1000,
    eval_clips: Annotated[int, typer.Option(help="Held-out clips.")] = 240,
    options: Annotated[list[str] | None, typer.Option("--set", help="name=value of the training recipe.")] = None,
) -> None:
    """The main job, whole: render the sample world, serve it, ingest it through yt-dlp, pretrain, evaluate."""
    # A temporary server with a database of its own: the demo leans on no other, and writes into none.
    os.environ.pop("PREFECT_API_URL", None)
    os.environ["PREFECT_HOME"] = str((out / "prefect").resolve())

    from cmacc.flows.demo import demo as run_demo
    from cmacc.ingest.world import WorldConfig

    config = WorldConfig(clips=clips, eval_clips=eval_clips, seed=seed)
    run_demo(out, config, parse_options(options), lambda text: out_console.print(text, highlight=False, soft_wrap=True))


_IN_ORDER = {
    "Get clips": ("plan", "sample-world", "ingest", "status", "index"),
    "Work with data sets": ("reshard", "inspect", "lint", "extract", "embed", "search"),
    "Train": ("recipes", "bench", "pretrain", "replay", "evaluate", "report", "export"),
    "All of it": ("run", "server-setup", "demo"),
}


def _put_in_order() -> None:
    """Commands in the order of the work, for `cmacc --help`."""
    panels = {name: panel for panel, names in _IN_ORDER.items() for name in names}
    places = list(panels)
    for command in app.registered_commands:
        command.rich_help_panel = panels[_name(command)]
    app.registered_commands.sort(key=lambda command: places.index(_name(command)))


def _name(command: CommandInfo) -> str:
    return command.name or str(getattr(command.callback, "__name__", ""))


_put_in_order()
