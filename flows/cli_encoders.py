"""The commands that use trained encoders: export, embedding a data set, searching it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from cmacc.flows.console import app, out_console, print_table

_MODEL = "A run's folder, a checkpoint or an export; a path or an fsspec URL."


@app.command(epilog="Example: [bold]cmacc export runs/first --out exports/first[/bold]")
def export(
    model: Annotated[str, typer.Argument(help=_MODEL)],
    folder: Annotated[str | None, typer.Argument(hidden=True)] = None,
    out: Annotated[str, typer.Option("--out", "-o", help="Folder, or fsspec URL, for all that is written.")] = "",
    programs: Annotated[bool, typer.Option(help="Write a torch.export program (.pt2) of each encoder too.")] = True,
    onnx: Annotated[bool, typer.Option("--onnx", help="Write an ONNX model of each encoder too.")] = False,
) -> None:
    """Write the trained encoders for use elsewhere: weights as safetensors, constants of their input, programs, a model card."""
    from cmacc.train.export.export import export as write

    if folder is not None or not out:
        raise ValueError(f"there is no folder to export to; write: cmacc export {model} --out {folder or 'exports/mine'}")
    with out_console.status("loading the encoders") as status:
        made = write(model, out, programs=programs, onnx=onnx, on_progress=lambda what: status.update(f"writing: {what}"))
    for note in made.notes:
        out_console.print(note, highlight=False, markup=False)
    out_console.print(f"exported to {out}: {', '.join(made.files)}", highlight=False, markup=False, soft_wrap=True)


@app.command(epilog="Example: [bold]cmacc embed runs/first data/audioset[/bold]")
def embed(
    model: Annotated[str, typer.Argument(help=_MODEL)],
    data: Annotated[str, typer.Argument(help="A data set: folder or fsspec URL.")],
    name: Annotated[str, typer.Option(help="The columns are video-NAME and audio-NAME (default: the run's folder's).")] = "",
    batch: Annotated[int, typer.Option(help="Clips at once.")] = 32,
) -> None:
    """Embed every clip of a data set, as columns of its catalog. Stopped, the same command goes on."""
    from cmacc.flows.progress import progress
    from cmacc.shards.dataset import Dataset
    from cmacc.train.export.trained import load_trained
    from cmacc.train.loading.loader import LoaderConfig
    from cmacc.train.search.embed import default_name, embed_dataset

    dataset, trained = Dataset.open(data), load_trained(model)
    with progress("embed", total=len(dataset)) as tell:
        columns = embed_dataset(
            trained,
            dataset,
            name or default_name(model),
            LoaderConfig(batch=batch),
            lambda done: tell(done, "clips"),
            model=model,
        )
    out_console.print(f"{data}: columns {' and '.join(columns)}", highlight=False, markup=False, soft_wrap=True)


@app.command(epilog="Example: [bold]cmacc search data/audioset --audio dog.ogg --page dogs.html[/bold]")
def search(
    data: Annotated[str, typer.Argument(help="A data set that `cmacc embed` was run on: folder or fsspec URL.")],
    audio: Annotated[str, typer.Option(help="A media file, whose sound is the query.")] = "",
    video: Annotated[str, typer.Option(help="A media file, whose picture is the query.")] = "",
    key: Annotated[str, typer.Option(help="A clip of the data set.")] = "",
    to: Annotated[str, typer.Option(help="What is searched: video or audio (default: the other one than the query).")] = "",
    by: Annotated[str, typer.Option(help="With --key, what of the clip is the query: video or audio (default: not --to).")] = "",
    model: Annotated[str, typer.Option(help="Run, checkpoint or export that the data set was embedded with.")] = "",
    name: Annotated[str, typer.Option(help="Of the columns, where there are several.")] = "",
    top: Annotated[int, typer.Option(help="How many clips.")] = 12,
    other_videos: Annotated[bool, typer.Option("--other-videos", help="With --key: no clips of its own video.")] = False,
    page: Annotated[str, typer.Option(help="An HTML file, with all of them to see and hear.")] = "",
) -> None:
    """Find the clips nearest to a sound, a picture or another clip, across modalities."""
    if sum(map(bool, (audio, video, key))) != 1:
        raise ValueError("give one query: --audio FILE, --video FILE or --key KEY")
    if not key and (by or other_videos):
        raise ValueError(f"{'--by' if by else '--other-videos'} is for a clip of the data set; give it with --key")
    if top < 1:
        raise ValueError(f"--top is {top}; give 1 or more")

    from cmacc.flows.progress import progress
    from cmacc.shards.dataset import Dataset
    from cmacc.train.search.query import search_by_file, search_by_key

    dataset = Dataset.open(data)
    wanted, asked = _modality("--to", to), _modality("--by", by)
    with progress("search", total=len(dataset)) as tell:
        options: dict[str, Any] = {"to": wanted, "model": model or None, "name": name or None, "count": top}
        options["on_progress"] = lambda done: tell(done, "clips")
        if key:
            found = search_by_key(dataset, key, by=asked, other_videos=other_videos, **options)
        else:
            found = search_by_file(dataset, audio or video, "audio" if audio else "video", **options)
    rows = {}
    for rank, hit in enumerate(found.hits, start=1):
        row = int(hit.row or 0)
        labels = dataset.catalog.labels(slice(row, row + 1))[0]
        rows[str(rank)] = dataset.texts("key", [row])[0], ", ".join(labels), f"{hit.cosine:.3f}"
    words = {"video": "picture", "audio": "sound"}
    title = f"{words[found.to]}s nearest to the {words[found.by]} of {key or audio or video}"
    print_table(title, rows, ("clip", "label", "cosine"), right=False)
    if found.skipped:
        out_console.print(f"{found.skipped:,} of {len(dataset):,} clips have no embedding and were skipped", highlight=False)
    if page:
        from cmacc.train.search.page import write_search_page

        out_console.print(f"page: {write_search_page(dataset, found, page)}", highlight=False, markup=False, soft_wrap=True)


def _modality(option: str, value: str) -> Literal["video", "audio"] | None:
    known: dict[str, Literal["video", "audio"] | None] = {"": None, "video": "video", "audio": "audio"}
    if value not in known:
        raise ValueError(f"{option} is {value!r}; give video or audio")
    return known[value]
