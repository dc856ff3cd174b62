"""Settings that must stand before Prefect is imported: for the `cmacc` command, wherever it is called from."""

from __future__ import annotations

import os

LOST_AFTER_S = 150
"""Five heartbeats of a run, so that a server that is briefly away loses nobody."""
RESTARTS = 3

_DEFAULTS = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_EPHEMERAL_ENABLED": "true",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "60",
    "PREFECT_SERVER_DATABASE_TIMEOUT": "60",
    # As in prefect.yaml: an automation takes a run for lost that beats less often.
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
    "PREFECT_LOGGING_EXTRA_LOGGERS": "cmacc",
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
    # The command tells its user one sentence; Prefect would print the traceback of a wrong option.
    "PREFECT_LOGGING_LEVEL": "CRITICAL",
    "PREFECT_LOGGING_SERVER_LEVEL": "CRITICAL",
    "PREFECT_LOGGING_INTERNAL_LEVEL": "CRITICAL",
}


def apply(verbose: bool) -> None:
    """Set what the user's environment does not. verbose: leave Prefect's own messages on."""
    for name, value in _DEFAULTS.items():
        if not (verbose and "LEVEL" in name):
            os.environ.setdefault(name, value)
