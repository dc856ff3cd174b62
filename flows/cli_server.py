"""The command that readies a Prefect server."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from cmacc.flows.console import app, out_console
from cmacc.flows.settings import LOST_AFTER_S, RESTARTS


@app.command("server-setup", epilog="Example: [bold]cmacc server-setup && prefect deploy --all[/bold]")
def server_setup(
    lost_after: Annotated[
        int, typer.Option(help="Seconds without a sign of life after which a run is Crashed; a run gives one every 30 s.", min=60)
    ] = LOST_AFTER_S,
    restarts: Annotated[int, typer.Option(help="How often a Crashed run is started again.", min=0)] = RESTARTS,
    secret: Annotated[
        list[str] | None,
        typer.Option(help="Environment variable that containers of the pool `docker` get, kept as a Secret block; repeatable."),
    ] = None,
    kubernetes_template: Annotated[
        Path | None,
        typer.Option(help="Of the pool `kubernetes`, JSON. Default: infra/kubernetes/base-job-template.json, if it is there."),
    ] = None,
) -> None:
    """Ready a Prefect server: work pools for all deployments, and automations for lost runs. A second time changes nothing."""
    if not os.environ.get("PREFECT_API_URL"):
        raise ValueError(
            "PREFECT_API_URL is not set, so there is no server to ready; start one with `prefect server start` and set "
            "PREFECT_API_URL=http://127.0.0.1:4200/api"
        )
    missing = [name for name in secret or () if not os.environ.get(name)]
    if missing:
        raise ValueError(f"{missing[0]} is not set; export it, and --secret {missing[0]} keeps its value on the server")

    from prefect.client.orchestration import get_client

    from cmacc.flows import automations, pools

    if kubernetes_template is None and pools.KUBERNETES_TEMPLATE.exists():
        kubernetes_template = pools.KUBERNETES_TEMPLATE
    with get_client(sync_client=True) as client:
        told = pools.ensure(client, kubernetes_template, {name: os.environ[name] for name in secret or ()})
        wanted = automations.automations(lost_after, restarts)
        automations.ensure(client, wanted)
    for line in [*told, *(f"automation {automation.name}" for automation in wanted)]:
        out_console.print(line, highlight=False, markup=False)
