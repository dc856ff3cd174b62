"""Flows that are plain functions until somebody wants them tracked: importing Prefect takes seconds, a command need not."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cached_property, update_wrapper
from typing import Any


class Tracked:
    """Called, it is a Prefect flow of this name; `fn` is the function by itself, which knows no server."""

    def __init__(self, name: str, fn: Callable[..., Any]) -> None:
        self.name, self.fn = name, fn
        update_wrapper(self, fn)

    @cached_property
    def flow(self) -> Any:
        """Prefect's own object, for deployments."""
        from prefect import flow

        return flow(name=self.name, log_prints=False)(self.fn)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self.flow(*arguments, **options)


def tracked(name: str) -> Callable[[Callable[..., Any]], Tracked]:
    """Decorator: make a function a flow of this name."""
    return lambda fn: Tracked(name, fn)


def under_prefect() -> bool:
    """Whether a flow run is being tracked. The `cmacc` command calls the plain functions when there is no server."""
    if "prefect" not in sys.modules:
        return False
    from prefect.context import FlowRunContext

    return FlowRunContext.get() is not None
