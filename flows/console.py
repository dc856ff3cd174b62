"""What the commands share: how a flow is called, how numbers and refusals are shown."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

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


def print_table(title: str, rows: Mapping[str, Any], heads: Sequence[str] = (), right: bool = True) -> None:
    """Names with a value each, or with one for each of `heads`, set to the right or not; what is wide is folded, never cut."""
    table = Table(title=_plain(title), show_header=bool(heads), title_justify="left")
    for head in ("", *(heads or ("",))):
        table.add_column(head, overflow="fold", justify="right" if right and heads and head else "left")
    for name, value in rows.items():
        values = value if heads else [value]
        table.add_row(_plain(name), *(_plain(f"{v:.4g}" if isinstance(v, float) else str(v)) for v in values))
    out_console.print(table)


def _plain(text: str) -> Text:
    """Text as it is: no brackets are markup, no control character of a label or an address reaches the terminal."""
    return Text("".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text))


def parse_options(pairs: list[str] | None) -> dict[str, str]:
    found = {}
    for pair in pairs or ():
        name, mark, value = pair.partition("=")
        if not mark:
            raise ValueError(f"option {pair!r} has no value; write it as name=value, e.g. objective.tau=0.1")
        found[name] = value
    return found
