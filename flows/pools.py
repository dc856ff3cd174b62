"""The work pools that the deployments of prefect.yaml name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from prefect.blocks.system import Secret
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.exceptions import ObjectNotFound
from pydantic import SecretStr

KUBERNETES_TEMPLATE = Path("infra/kubernetes/base-job-template.json")
TYPES = {"local": "process", "docker": "docker", "kubernetes": "kubernetes"}


def ensure(client: SyncPrefectClient, kubernetes_template: Path | None, secrets: Mapping[str, str]) -> list[str]:
    """Make the three pools where they are missing, and give `docker` and `kubernetes` their base job templates.

    kubernetes_template: a JSON file; None leaves that pool as it is, or Prefect's own. secrets: environment variables of the
    containers of `docker`, by name; kept as Secret blocks, which the template only names. Returns a line for each pool, of what
    was done. Raises ValueError for a pool of another type.
    """
    told = []
    for name, kind in TYPES.items():
        try:
            pool = client.read_work_pool(name)
        except ObjectNotFound:
            client.create_work_pool(WorkPoolCreate(name=name, type=kind, base_job_template=_default(client, kind)))
            pool = client.read_work_pool(name)
            told.append(f"work pool {name}: made")
        else:
            told.append(f"work pool {name}: is there")
        if pool.type != kind:
            raise ValueError(f"the work pool {name} is of type {pool.type}, but {kind} is wanted; delete or rename it")
        template = pool.base_job_template
        if kind == "kubernetes" and kubernetes_template is not None:
            template = _read(kubernetes_template)
        elif kind == "docker":
            template = _with_secrets(_with_create_kwargs(template), _keep(secrets))
        if template != pool.base_job_template:
            client.update_work_pool(name, WorkPoolUpdate(base_job_template=template))
            told[-1] += ", base job template renewed"
    return told


def _default(client: SyncPrefectClient, kind: str) -> dict[str, Any]:
    """Prefect's template of a worker type, from the server's own collection: the worker's package need not be here."""
    response = client.request("GET", "/collections/views/{view}", path_params={"view": "aggregate-worker-metadata"})
    for workers in response.json().values():
        if kind in workers:
            found: dict[str, Any] = workers[kind]["default_base_job_configuration"]
            return found
    raise ValueError(f"the Prefect server knows no worker of type {kind}; renew it to the version in requirements.lock")


def _read(path: Path) -> dict[str, Any]:
    try:
        template: dict[str, Any] = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON ({error}); give a base job template of a Kubernetes work pool") from None
    if not {"job_configuration", "variables"} <= template.keys():
        raise ValueError(f"{path} has no job_configuration and variables; give a base job template of a Kubernetes work pool")
    return template


def _with_create_kwargs(template: Mapping[str, Any]) -> dict[str, Any]:
    """With a variable for what a container gets of GPUs and shared memory, which the server's own template leaves out."""
    changed = deepcopy(dict(template))
    changed["job_configuration"].setdefault("container_create_kwargs", "{{ container_create_kwargs }}")
    changed["variables"]["properties"].setdefault(
        "container_create_kwargs",
        {"title": "Container create kwargs", "description": "Further arguments of docker-py's create.", "type": "object"},
    )
    return changed


def _keep(secrets: Mapping[str, str]) -> dict[str, str]:
    """Secrets as blocks of the server, encrypted there. Returns, for each variable, the words that stand for its value."""
    named = {}
    for variable, value in secrets.items():
        block = f"cmacc-{variable.lower().replace('_', '-')}"
        Secret(value=SecretStr(value)).save(block, overwrite=True)
        named[variable] = f"{{{{ prefect.blocks.secret.{block} }}}}"
    return named


def _with_secrets(template: Mapping[str, Any], named: Mapping[str, str]) -> dict[str, Any]:
    """Named in the template, the worker puts in their values; those in prefect.yaml `prefect deploy` would store in the clear."""
    changed = deepcopy(dict(template))
    env = changed["variables"]["properties"].setdefault("env", {"type": "object"})
    if named:
        env["default"] = {**(env.get("default") or {}), **named}
    return changed
