"""The flows as Prefect knows them: where the deployments of prefect.yaml enter.

Each is imported when it is asked for: a worker that ingests need not load what trains.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_MODULES = {"ingest": "ingest", "ingest_part": "parts", "reshard": "reshard", "pretrain": "pretrain", "evaluate": "evaluate"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"there is no flow {name}; there are {', '.join(_MODULES)}")
    return getattr(import_module(f"cmacc.flows.{_MODULES[name]}"), name).flow
