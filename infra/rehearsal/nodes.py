"""torchrun on several hosts, each started again whenever it ends unwell, as systemd, Slurm or a spot service would do."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence

from hosts import Host
from services import BIN, Services

_RENDEZVOUS = 29500
_AGAIN_S = 2.0
_MOST_LIVES = 30
_SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"


class Gang:
    """One training on several hosts. nodes: ranks on each host, by its name; name: of the rendezvous and of the log;
    arguments: of `cmacc`."""

    def __init__(self, services: Services, nodes: Mapping[str, int], name: str, arguments: Sequence[object]) -> None:
        self.services, self.name = services, name
        hosts = [services.hosts[host] for host in nodes]
        self._nodes = {
            host.name: _Node(services, host, _torchrun(hosts, host, nodes[host.name], name) + list(arguments), name)
            for host in hosts
        }

    def run(self, enough: Callable[[], bool]) -> None:
        """Until all are through, or `enough` says so: then all of them are killed. Raises RuntimeError when one never is."""
        for node in self._nodes.values():
            node.start()
        try:
            while any(node.is_alive() for node in self._nodes.values()):
                if enough() or any(node.failed for node in self._nodes.values()):
                    break
                time.sleep(0.2)
        finally:
            for node in self._nodes.values():
                node.ended.set()
            for node in self._nodes.values():
                self.services.processes.kill(node.host)
                node.join()
        failed = [host for host, node in self._nodes.items() if node.failed]
        if failed:
            raise RuntimeError(f"{failed[0]} does not come through:\n{self.services.processes.said(self.name)}")

    @property
    def lives(self) -> int:
        """How often torchrun was started, on all hosts together."""
        return sum(node.lives for node in self._nodes.values())

    def power_off(self, host: str) -> None:
        """Before its processes are killed: it does not start again by itself."""
        self._nodes[host].powered.clear()

    def power_on(self, host: str) -> None:
        self._nodes[host].powered.set()


class _Node(threading.Thread):
    """powered: whether the machine is there; lives: how often torchrun was started; failed: too often."""

    def __init__(self, services: Services, host: Host, command: list[object], log: str) -> None:
        super().__init__(name=host.name, daemon=True)
        self.services, self.host, self.lives, self.failed = services, host, 0, False
        self._command, self._log = command, log
        self.powered, self.ended = threading.Event(), threading.Event()
        self.powered.set()

    def run(self) -> None:
        interface = {"GLOO_SOCKET_IFNAME": "eth0"} if self.host.namespace else {}
        for _ in range(_MOST_LIVES):
            while not self.powered.wait(0.2):
                if self.ended.is_set():
                    return
            self.lives += 1
            process = self.services.processes.start(
                self.host, self._log, self._command, {**self.services.environment, **interface}
            )
            if process.wait() == 0 or self.ended.wait(_AGAIN_S):
                return
        self.failed = True


def _torchrun(hosts: Sequence[Host], host: Host, ranks: int, name: str) -> list[object]:
    """As README has it for many nodes. is_host, local-addr: a namespace has no name of its own by which torch could tell."""
    return [
        BIN / "torchrun", "--nnodes", len(hosts), "--nproc-per-node", ranks, "--rdzv-backend", "c10d",
        "--rdzv-endpoint", hosts[0].at(_RENDEZVOUS), "--rdzv-conf", f"is_host={int(host is hosts[0])}", "--rdzv-id", name,
        "--local-addr", host.address, "--signals-to-handle", _SIGNALS, "-m", "cmacc",
    ]  # fmt: skip
