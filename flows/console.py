"""What the commands share: how a flow is called, how numbers and refusals are shown."""

from __future__ import annotations

import os
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(
    name="cmacc",
    help="From a list of YouTube clips to a pretrained audio-visual encoder.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
out_console, err_console = Console(), Console(stderr=True)


def call_flow(flow: Any, *arguments: Any, tracked: bool = False, **options: Any) -> Any:
    """Run a flow: tracked by the server that PREFECT_API_URL names, or as the plain function it is, with no server at all.

    tracked: it needs one, so that a temporary server is started if need be.
    """
    return (flow if tracked or os.environ.get("PREFECT_API_URL") else flow.fn)(*arguments, **options)


def escape(text: str) -> str:
    return text.replace("[", r"\[")


def print_table(title: str, rows: dict[str, Any]) -> None:
    table = Table(title=title, show_header=False, title_justify="left")
    for name, value in rows.items():
        table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
    out_console.print(table)


def parse_options(pairs: list[str] | None) -> dict[str, str]:
    found = {}
    for pair in pairs or ():
        name, mark, value = pair.partition("=")
        if not mark:
            raise ValueError(f"option {pair!r} has no value; write it as name=value, e.g. objective.tau=0.1")
        found[name] = value
    return found
