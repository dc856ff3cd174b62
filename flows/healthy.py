"""Whether a container's command is well, for its health check: `python -m cmacc.flows.healthy [URL]`.

Exit status 0 or 1, and in the second case a sentence. Without a URL, a Prefect worker is asked by its own endpoint, which knows
whether it still asks its server for work; any other command is well as long as it runs.
"""

from __future__ import annotations

import os
import sys
import urllib.request
from pathlib import Path

_PATIENCE_S = 5.0


def trouble(url: str) -> str:
    """What is wrong at `url`, as a sentence; nothing when it answers."""
    try:
        with urllib.request.urlopen(url, timeout=_PATIENCE_S):
            return ""
    except OSError as error:  # an answer of 400 and above too
        return f"{url}: {error}"


def worker_url(command: list[str]) -> str:
    """Where a Prefect worker that was started by `command` tells of its health; nothing for another command."""
    if "--with-healthcheck" not in command:
        return ""
    return f"http://127.0.0.1:{os.environ.get('PREFECT_WORKER_WEBSERVER_PORT', '8080')}/health"


def main() -> int:
    url = sys.argv[1] if len(sys.argv) > 1 else worker_url(Path("/proc/1/cmdline").read_text().split("\0"))
    wrong = trouble(url) if url else ""
    print(wrong or "well")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
