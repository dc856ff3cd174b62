"""From a flow's bare name to `prefect deployment run FLOW/DEPLOYMENT`: Prefect itself takes only the long form."""

from __future__ import annotations

import os
import subprocess
import sys

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowFilter, FlowFilterName

PREFERRED = "local"


def resolve(name: str) -> str:
    """`ingest` to `ingest/local`, or to the only deployment that flow has. Raises ValueError with one sentence."""
    if "/" in name:
        return name
    if not os.environ.get("PREFECT_API_URL"):
        raise ValueError(
            "PREFECT_API_URL is not set, so there is no server to ask for deployments; start one with `prefect server start` "
            "and set PREFECT_API_URL=http://127.0.0.1:4200/api"
        )
    with get_client(sync_client=True) as client:
        found = client.read_deployments(flow_filter=FlowFilter(name=FlowFilterName(any_=[name])))
    names = sorted(deployment.name for deployment in found)
    if not names:
        raise ValueError(f"the server knows no deployment of {name!r}; run `prefect deploy --all` in the project's folder")
    if PREFERRED not in names and len(names) > 1:
        raise ValueError(f"{name} has several deployments; name one: {', '.join(f'{name}/{n}' for n in names)}")
    return f"{name}/{PREFERRED if PREFERRED in names else names[0]}"


def run_deployment(name: str, arguments: list[str]) -> int:
    """Run it, passing `arguments` on; returns the exit status."""
    return subprocess.run([sys.executable, "-m", "prefect", "deployment", "run", name, *arguments], check=False).returncode
