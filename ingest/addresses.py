"""Addresses that strangers wrote: which video one names, whether it may be asked for, and how to show it."""

from __future__ import annotations

import ipaddress
import re
import socket
import unicodedata
from urllib.parse import SplitResult, parse_qs, unquote, urlsplit

YOUTUBE_ID = re.compile(r"[A-Za-z0-9_-]{11}")
ALLOW = "allow it with --allow-private"

_YOUTUBE_HOST = re.compile(r"(?:(?:www|m|music|gaming)\.)?(?:youtube(?:-nocookie)?\.com|youtu\.be)\.?")
_YOUTUBE_PATH = re.compile(r"/(?:embed|shorts|v|e|live|watch)/([^/]+)")
_INNER_NAMES = frozenset(("localhost", "local", "internal", "localdomain"))


def youtube_id(address: str) -> str | None:
    """The id in any form of a YouTube address, with or without `https://`, or None."""
    if "youtu" not in address.lower():
        return None
    try:
        parts = urlsplit(address if "://" in address else f"https://{address}")
    except ValueError:
        return None
    host = parts.hostname or ""
    if parts.scheme not in ("http", "https") or not _YOUTUBE_HOST.fullmatch(host):
        return None
    if "youtu.be" in host:
        found = parts.path.split("/")[1] if parts.path else ""
    elif in_path := _YOUTUBE_PATH.match(parts.path):
        found = in_path[1]
    else:
        found = parse_qs(parts.query).get("v", [""])[0]
    return found if YOUTUBE_ID.fullmatch(found) else None


def web_address(url: str, allow_private: bool = False) -> str:
    """`url`, its scheme in small letters, or ValueError with the reason why not to ask for it: a sentence without passwords.

    Without allow_private the host must not be a private, loopback, link-local or reserved IP address in any spelling, nor a
    name of this machine or its network. What a public name resolves to is not looked up here.
    """
    if not url.isprintable() or "\\" in url:  # parsers differ over these, so that one's host is not the other's
        raise ValueError("address holds a backslash or a control character")
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname or "", parts.port
        inner = not allow_private and is_private(host)
    except ValueError as error:
        raise ValueError("address has no valid host or port") from error
    if parts.scheme not in ("http", "https"):
        raise ValueError(f"address {shown(url)} is not http or https")
    if "@" in parts.netloc:
        raise ValueError("address holds a user name or a password; give it without")
    if not host or " " in host:
        raise ValueError(f"address {shown(url)} names no host")
    if inner:
        raise ValueError(f"address {shown(url)} is of this machine or a private network; {ALLOW}")
    return parts.scheme + url[len(parts.scheme) :]


def file_address(url: str) -> str:
    """The path in a `file:` address. Raises ValueError when it is one of another machine."""
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
        raise ValueError(f"address {shown(url)} names no file of this machine")
    return unquote(parts.path)


def plain_address(url: str) -> str:
    """What two spellings of one web address share: its host in small letters, path and query. Raises ValueError for none."""
    parts: SplitResult = urlsplit(url)
    if not parts.hostname:
        raise ValueError(f"address {shown(url)} names no host")
    port = "" if parts.port in (None, 80, 443) else f":{parts.port}"
    return f"{parts.hostname.rstrip('.')}{port}{parts.path or '/'}?{parts.query}"


def is_private(host: str) -> bool:
    """Whether a host names this machine or an address that is not of the public internet, however it is spelled."""
    host = re.sub("[。．｡]", ".", unicodedata.normalize("NFKC", host)).lower().rstrip(".")
    if "%" in host:  # an IPv6 zone, or an escape that another parser undoes
        return True
    last = host.rpartition(".")[2]
    if last in _INNER_NAMES:
        return True
    if ":" in host:
        return not _is_public(ipaddress.ip_address(host))
    if not re.fullmatch(r"\d+|0x[0-9a-f]*", last):
        return False
    try:
        return not _is_public(ipaddress.IPv4Address(socket.inet_aton(host)))  # decimal, hex, octal, two and three parts
    except OSError:
        return True


def _is_public(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    if isinstance(ip, ipaddress.IPv6Address):
        embedded = ip.ipv4_mapped or ip.sixtofour or (ip.teredo and ip.teredo[1])
        if ip in ipaddress.ip_network("64:ff9b::/96"):
            embedded = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if embedded:
            return _is_public(embedded)
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


def shown(text: str) -> str:
    """Text of a stranger for a message: short, quoted, without a user name or a password."""
    return repr(re.sub(r"//[^/\s]*@", "//", text[:300])[:80])
