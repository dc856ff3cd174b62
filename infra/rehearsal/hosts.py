"""Several hosts on one machine: network namespaces with addresses of their own where permitted, else ports of 127.0.0.1.

The namespaces hang on a bridge that lies in a private namespace of this very process, under a private mount of /run/netns: no
route or name of the machine's own is touched, and all of it goes with the last process, however that ends.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import socket
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

_NET = "10.213.77"
_CLONE_NEWNS, _CLONE_NEWNET = 0x0002_0000, 0x4000_0000
_MS_REC, _MS_PRIVATE = 0x4000, 1 << 18


@dataclass
class Host:
    """One of several machines. address: where the others reach it; namespace: path of its network, empty for this machine's."""

    name: str
    address: str = "127.0.0.1"
    namespace: str = ""
    _ports: dict[int, int] = field(default_factory=dict)

    def command(self, command: Iterable[object]) -> list[str]:
        """What runs a command on this host. It keeps the process id and the environment."""
        enter = ["nsenter", f"--net={self.namespace}", "--"] if self.namespace else []
        return [*enter, *map(str, command)]

    def port(self, usual: int) -> int:
        """The usual port of a service, or in its place a free one that stays the same, where hosts share their ports."""
        if self.namespace:
            return usual
        if usual not in self._ports:
            with socket.socket() as free:
                free.bind((self.address, 0))
                self._ports[usual] = free.getsockname()[1]
        return self._ports[usual]

    def at(self, usual: int) -> str:
        """`address:port` of a service."""
        return f"{self.address}:{self.port(usual)}"


def make_hosts(names: Iterable[str], loopback: bool = False) -> tuple[dict[str, Host], str]:
    """Hosts by name, and a sentence that says what they are.

    loopback: ports of 127.0.0.1 even where namespaces are permitted. Call it before any thread is started: with namespaces this
    process moves to a network of its own, where it reaches the hosts and nothing else.
    """
    names = list(names)
    why_not = "asked for" if loopback else _hindrance()
    if not why_not:
        try:
            return _namespaces(names), f"each host is a network namespace with an address of its own in {_NET}.0/24"
        except (OSError, subprocess.CalledProcessError) as error:
            said = getattr(error, "stderr", "") or str(error)
            why_not = f"namespaces are not permitted: {said.strip()}"
    return {name: Host(name) for name in names}, f"each host is a set of processes with ports of its own on 127.0.0.1 ({why_not})"


def _hindrance() -> str:
    if os.geteuid():
        return "namespaces need root"
    missing = [tool for tool in ("ip", "nsenter", "mount") if not shutil.which(tool)]
    return f"there is no `{missing[0]}`, of iproute2 or util-linux" if missing else ""


def _namespaces(names: list[str]) -> dict[str, Host]:
    _do("ip", "netns", "list")  # before anything is changed
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS | _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    folder = Path("/run/netns")
    folder.mkdir(exist_ok=True)
    if libc.mount(None, b"/", None, _MS_REC | _MS_PRIVATE, None):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    _do("mount", "-t", "tmpfs", "tmpfs", str(folder))
    _do("ip", "link", "set", "lo", "up")
    _do("ip", "link", "add", "hosts", "type", "bridge")
    _do("ip", "address", "add", f"{_NET}.1/24", "dev", "hosts")
    _do("ip", "link", "set", "hosts", "up")
    hosts = {}
    for number, name in enumerate(names, start=10):
        _do("ip", "netns", "add", name)
        _do("ip", "link", "add", f"to-{number}", "type", "veth", "peer", "name", "eth0", "netns", name)
        _do("ip", "link", "set", f"to-{number}", "master", "hosts", "up")
        _do("ip", "-n", name, "address", "add", f"{_NET}.{number}/24", "dev", "eth0")
        _do("ip", "-n", name, "link", "set", "lo", "up")
        _do("ip", "-n", name, "link", "set", "eth0", "up")
        hosts[name] = Host(name, f"{_NET}.{number}", str(folder / name))
    return hosts


def _do(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
