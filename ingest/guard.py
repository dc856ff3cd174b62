"""Keep a process that follows strangers' addresses out of the network it stands in."""

from __future__ import annotations

import ipaddress
import socket
import sys
from collections.abc import Collection
from urllib.parse import urlsplit
from urllib.request import getproxies

from cmacc.ingest.addresses import ALLOW, is_private
from cmacc.ingest.causes import Cause, IngestFailure


class _Refused(IngestFailure, OSError):
    """An OSError too: as such every HTTP library carries it up instead of choking on it."""


def guard_sockets(allowed: Collection[str] = ()) -> None:
    """From now on this process connects to public addresses only, whatever redirects and names lead it to. It cannot be undone.

    allowed: URLs of proxies, which may stand anywhere; what lies behind a proxy is the proxy's to guard.
    A connection refused raises IngestFailure (forbidden), which is an OSError at the same time. Other programs that this
    process starts are not guarded.
    """
    exempt = {end for url in allowed for end in _ends(url)}

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        if event != "socket.connect":
            return
        address = arguments[1]
        if isinstance(address, tuple) and address[:2] not in exempt and not _is_public(str(address[0])):
            raise _Refused(Cause.FORBIDDEN, _sentence(str(address[0])))

    sys.addaudithook(watch)


def refuse_private(url: str) -> None:
    """Raises IngestFailure (forbidden) when the host of this URL is no public one as it is written."""
    try:
        host = urlsplit(url).hostname or ""
        private = is_private(host)
    except ValueError as error:
        raise IngestFailure(Cause.BAD_ROW, f"the address has no valid host: {error}") from error
    if private:
        raise IngestFailure(Cause.FORBIDDEN, _sentence(host))


def proxies(named: str) -> list[str]:
    """URLs of the proxies in use: the named one, else those of the environment."""
    return [named] if named else [url for scheme, url in getproxies().items() if scheme != "no"]


def _sentence(host: str) -> str:
    return f"{host[:80]} is of this machine or a private network; {ALLOW}"


def _is_public(host: str) -> bool:
    """False for a name too: whoever connects has resolved it before, or else nobody has looked where it leads."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return not is_private(host)


def _ends(url: str) -> set[tuple[str, int]]:
    """The (address, port) pairs that a proxy's URL leads to."""
    parts = urlsplit(url if "://" in url else f"http://{url}")
    port = parts.port or {"https": 443, "socks4": 1080, "socks5": 1080, "socks5h": 1080}.get(parts.scheme, 80)
    try:
        found = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
    except OSError:
        return set()  # to be told when it is connected to
    return {(str(end[4][0]), port) for end in found}
