"""The command that shows a run to people: one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cmacc.flows.console import app, out_console


@app.command(epilog="Example: [bold]cmacc report runs/first --out first.html[/bold]")
def report(
    run: Annotated[str, typer.Argument(help="A run's folder, finished or in mid-training.")],
    out: Annotated[Path | None, typer.Option(help="The HTML file; default: report.html in the run's folder.")] = None,
    examples: Annotated[
        int, typer.Option(min=0, help="Held-out clips to play, each with the sounds nearest to its picture; 0: none.")
    ] = 4,
) -> None:
    """Write one page of a run: configuration, curves, diversity, evaluations, nearest clips that play, cost."""
    from cmacc.flows.progress import progress
    from cmacc.train.report.page import write_report

    with progress("report", total=0) as tell:
        page = write_report(run, out, examples=examples, on_progress=lambda done, of: tell(done, "clips embedded", of))
    out_console.print(f"report: {page}", highlight=False, soft_wrap=True, markup=False)
