"""The commands on a data set that is there: re-sharding, looking into it, checking it, adding to it."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from cmacc.flows.console import app, call_flow, err_console, escape, out_console, print_table
from cmacc.flows.shown import counted, described, resharded

_WHICH, _HOW = "Which clips", "How they lie"


@app.command(
    epilog="Example: [bold]cmacc reshard data/audioset --out data/dogs "
    "--where \"list_contains(labels, 'Dog') and duration_s >= 9\" --order shuffle:1 --split train:0.9,val:0.1[/bold]"
)
def reshard(
    sources: Annotated[list[str], typer.Argument(help="Data sets: folders or fsspec URLs.")],
    out: Annotated[str, typer.Option(help="Folder or fsspec URL of the new data set.")],
    where: Annotated[str | None, typer.Option(help="SQL expression over the catalog's columns.", rich_help_panel=_WHICH)] = None,
    balance: Annotated[
        str | None, typer.Option(help="labels or a column: as many clips for each of its values.", rich_help_panel=_WHICH)
    ] = None,
    dedup: Annotated[
        float | None,
        typer.Option(
            help="Leave out clips whose embedding has this cosine with an earlier one's, as 0.95.", rich_help_panel=_WHICH
        ),
    ] = None,
    diverse: Annotated[
        int | None, typer.Option(help="So many clips that cover all, by k-means++ over embeddings.", rich_help_panel=_WHICH)
    ] = None,
    embedding: Annotated[
        str | None, typer.Option(help="NAME of `cmacc embed`, or a column, if there are several.", rich_help_panel=_WHICH)
    ] = None,
    limit: Annotated[int | None, typer.Option(help="The first so many.", rich_help_panel=_WHICH)] = None,
    order: Annotated[str, typer.Option(help="source, shuffle:SEED or by:COLUMN.", rich_help_panel=_HOW)] = "source",
    split: Annotated[
        str | None,
        typer.Option(help="New splits by source video, as train:0.9,val:0.1; shards of one split.", rich_help_panel=_HOW),
    ] = None,
    shard_size: Annotated[str, typer.Option(help="At most, as 512MB or 256MiB.", rich_help_panel=_HOW)] = "256MiB",
    members: Annotated[str | None, typer.Option(help="Media members to keep, as mp4,flac.", rich_help_panel=_HOW)] = None,
    transcode: Annotated[
        str | None,
        typer.Option(help="Decode and encode anew: h264, or h264:short_side=112,fps=16,gop=16.", rich_help_panel=_HOW),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1, help="Shards (or clips to transcode) at work at once; by default as many as pay.", rich_help_panel=_HOW
        ),
    ] = None,
) -> None:
    """Filter, merge, order, split and re-cut data sets; bytes are copied, nothing is decoded. The same command continues."""
    from cmacc.flows.reshard import reshard as flow

    kept = None if members is None else [member.strip() for member in members.split(",")]
    done = call_flow(
        flow, sources, out, where=where, order=order, shard_size=shard_size, limit=limit, split=split, balance=balance,
        dedup=dedup, diverse=diverse, embedding=embedding, members=kept, transcode=transcode, workers=workers,
    )  # fmt: skip
    print_table(f"reshard: {out}", resharded(done, "encoded" if transcode else "copied"))


@app.command(
    epilog="Example: [bold]cmacc index /data/webvid[/bold], then [bold]cmacc inspect /data/webvid[/bold] "
    "and [bold]cmacc reshard /data/webvid --out data/webvid --transcode h264[/bold]"
)
def index(
    folder: Annotated[str, typer.Argument(help="Folder or fsspec URL with tars of video2dataset, webdataset or others.")],
    members: Annotated[
        str | None, typer.Option(help="Members of every clip, as mp4,json. Default: those that nearly all samples have.")
    ] = None,
    label_field: Annotated[str | None, typer.Option(help="Where the labels are, as tags or info.category or cls.")] = None,
    source_field: Annotated[str | None, typer.Option(help="Where the source video is: a URL, a YouTube id, a name.")] = None,
    split_field: Annotated[str | None, typer.Option(help="Where the split is.")] = None,
    caption_field: Annotated[str | None, typer.Option(help="Where the caption is.")] = None,
    workers: Annotated[int, typer.Option(min=0, help="Tars read at once; 0: one a core, at most 8.")] = 0,
    measure: Annotated[bool, typer.Option("--measure", help="Decode everything, for loudness and motion.")] = False,
) -> None:
    """Make tars that others wrote a data set where they lie: catalog and indexes beside them, no tar is touched.

    Fields are dotted paths into the json member, or names of text members; those of video2dataset and webdataset are known. What
    does not fit is left out and told in index-report.csv. Run it again when tars came, changed or went: it reads those alone.
    """
    from cmacc.flows.progress import progress
    from cmacc.shards.foreign import REASONS, REPORT, Fields, index_shards

    fields = Fields(label_field, source_field, split_field, caption_field)
    chosen = members.split(",") if members else None
    with progress("index", total=0) as tell:
        done = index_shards(
            folder, fields=fields, members=chosen, measure=measure, workers=workers,
            on_progress=lambda read, total, name: tell(read, f"MiB  {name}", total),
        )  # fmt: skip
    profile = done.profile
    alike = (
        f"{profile.codec} and {profile.audio_codec}: train from it as it is" if profile else "not one of ours: transcode to train"
    )
    known = f", {done.unchanged} known from before" if done.unchanged else ""
    print_table(
        f"index: {folder}",
        {
            "clips": f"{done.clips} of {done.samples} samples", "members": ", ".join(done.members), "profile": alike,
            "tars": f"{done.shards} in the data set; {done.read} read now{known}",
        },
    )  # fmt: skip
    if done.left_out:
        print_table(f"left out: see {REPORT}", {f"{n}": f"{reason}: {REASONS[reason]}" for reason, n in done.left_out.items()})
    for remark in done.remarks:
        err_console.print(f"[yellow]{escape(remark)}[/yellow]", soft_wrap=True, highlight=False)


@app.command(epilog="Example: [bold]cmacc inspect data/audioset --page page.html --where \"list_contains(labels, 'Dog')\"[/bold]")
def inspect(
    data: Annotated[str, typer.Argument(help="A data set: folder or fsspec URL.")],
    page: Annotated[Path | None, typer.Option(help="Also write a page with clips to see and hear, HTML.")] = None,
    sheet: Annotated[Path | None, typer.Option(help="Also write a contact sheet, PNG.")] = None,
    clips: Annotated[int | None, typer.Option(min=0, help="Clips on the page (24) or on the sheet (8).")] = None,
    split: Annotated[str | None, typer.Option(help="Of the page: clips of this split alone.")] = None,
    where: Annotated[str | None, typer.Option(help="Of the page: an SQL expression over the catalog's columns.")] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Of the page: draw its clips by chance, instead of evenly over the data set.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print a data set's facts: clips, hours, bytes, splits, labels, quantiles of duration, loudness and motion."""
    from cmacc.shards.dataset import Dataset
    from cmacc.shards.describe import describe

    if page is None and (split is not None or where is not None or seed is not None):
        raise ValueError("--split, --where and --seed choose what a page shows; give --page FILE.html with them")
    dataset = Dataset.open(data)
    facts = describe(dataset)
    if as_json:
        print(json.dumps(facts, indent=2))
    else:
        print_table(data, described(facts))
        measured = {name: list(values.values()) for name, values in facts["quantiles"].items() if values}
        if measured:
            print_table("quantiles", measured, list(next(v for v in facts["quantiles"].values() if v)))
    said = err_console if as_json else out_console
    if sheet:
        from cmacc.shards.page import contact_sheet

        made = contact_sheet(dataset, sheet, 8 if clips is None else clips)
        said.print(f"contact sheet: {escape(str(made))}", highlight=False, soft_wrap=True)
    if page:
        from cmacc.flows.progress import progress
        from cmacc.shards.page import selection, write_page

        rows, shown = selection(dataset, split, where), 24 if clips is None else clips
        chosen = " and ".join([*([f"split {split!r}"] if split is not None else []), *([where] if where else [])])
        with progress("page", total=min(shown, len(rows))) as tell:
            write_page(
                dataset, page, rows=rows, said=chosen, clips=shown, seed=seed, facts=facts,
                on_progress=lambda done: tell(done, "clips"),
            )  # fmt: skip
        said.print(f"page: {escape(str(page))}", highlight=False, soft_wrap=True)


@app.command(epilog="Example: [bold]cmacc lint data/audioset[/bold]")
def lint(
    data: Annotated[str, typer.Argument(help="A data set: folder or fsspec URL.")],
    samples: Annotated[int, typer.Option(help="Clips to decode.")] = 64,
    checksums: Annotated[bool, typer.Option(help="Read every shard whole and compare its sha256.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the faults as JSON.")] = False,
) -> None:
    """Check everything a data set promises; exit status 1 when something is wrong."""
    from cmacc.flows.progress import progress
    from cmacc.shards.dataset import Dataset
    from cmacc.shards.errors import DatasetError
    from cmacc.shards.lint import lint as find_faults

    size = 0
    with suppress(DatasetError):  # then it is the one fault that is found
        size = sum(shard.bytes for shard in Dataset.open(data).meta.shards) >> 20
    with progress("lint", total=size) as tell:
        faults = find_faults(data, samples=samples, checksums=checksums, on_progress=lambda done: tell(done >> 20, "MiB"))
    if as_json:
        print(json.dumps([asdict(fault) for fault in faults], indent=2))
        raise typer.Exit(1 if faults else 0)
    for fault in faults:
        out_console.print(
            f"[red]{fault.code}[/red] {escape(fault.where)}: {escape(fault.sentence)}", soft_wrap=True, highlight=False
        )
    out_console.print(f"{escape(data)}: {counted(len(faults), 'fault') if faults else 'no fault'}", highlight=False)
    if faults:
        raise typer.Exit(1)


@app.command(epilog="Example: [bold]cmacc extract data/audioset yt_dQw4w9WgXcQ_10000_20000 --out clips --members mp4[/bold]")
def extract(
    data: Annotated[str, typer.Argument(help="A data set: folder or fsspec URL.")],
    keys: Annotated[list[str] | None, typer.Argument(help="Keys of clips.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the files, KEY.mp4 and so on.")] = Path("clips"),
    members: Annotated[str | None, typer.Option(help="Members to write, as mp4,flac (default: all).")] = None,
    rows: Annotated[str | None, typer.Option(help="Row numbers of further clips, as 0,5.")] = None,
) -> None:
    """Write some clips of a data set as files, verified by checksum."""
    from cmacc.shards.dataset import Dataset
    from cmacc.shards.errors import DatasetError
    from cmacc.shards.extract import extract as write_files

    try:
        numbers = [int(row) for row in rows.split(",")] if rows else []
    except ValueError as e:
        raise DatasetError(f"rows {rows!r} are not understood; give numbers, as 0,5") from e
    dataset = Dataset.open(data)
    chosen = [*dataset.rows_of(keys or []).tolist(), *numbers]
    if not chosen:
        raise DatasetError(f"no clip of {data} is named; give keys, or --rows 0,5")
    for file in write_files(dataset, chosen, out, members.split(",") if members else None):
        print(file)
