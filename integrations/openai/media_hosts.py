"""Which hosts a server may fetch images from."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

from ...base.errors import InvalidArgument

_ENTRY = re.compile(r"(\[[^\]]+\](?:/\d+)?|[^:\[\]]+)(?::(\d{1,5}))?")
_NAME = re.compile(r"\*|(\*\.)?[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?)*")
DEFAULT_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class _Entry:
    """`port` None: that of the scheme."""

    name: str | None
    network: IPv4Network | IPv6Network | None
    port: int | None

    def names(self, host: str) -> bool:
        if self.name is None:
            return False
        return self.name in ("*", host) or (self.name.startswith("*.") and host.endswith(self.name[1:]))

    def holds(self, address: IPv4Address | IPv6Address) -> bool:
        return self.network is not None and address in self.network


class AllowedHosts:
    """An allow-list. A host must be on it, and so must its address unless that is a public one.

    Args:
        entries: each a host's name; "*.example.org", all names below that one; "*", every name; an address; or a network
            such as 10.0.0.0/8. With ":8080" it is that port alone, without one 80 for http and 443 for https.

    Raises InvalidArgument for an entry that is none of these.
    """

    def __init__(self, entries: Iterable[str]):
        self._entries = [_parsed(entry) for entry in entries]

    def __bool__(self) -> bool:
        return bool(self._entries)

    def permits(self, scheme: str, host: str, port: int | None) -> bool:
        """Whether a URL may name `host`: a name in lower case, or an address. `port` None is the scheme's."""
        own = DEFAULT_PORTS[scheme]
        address = as_address(host)
        return any(
            (port or own) == (entry.port or own)
            and (entry.names(host) if address is None or entry.name == "*" else entry.holds(address))
            for entry in self._entries
        )

    def permits_address(self, address: IPv4Address | IPv6Address, port: int) -> bool:
        """Whether a host that is permitted may be at `address`: a public one, or one that is listed itself."""
        if address.is_global and not address.is_multicast:
            return True
        return any(entry.holds(address) and entry.port in (None, port) for entry in self._entries)


def as_address(host: str) -> IPv4Address | IPv6Address | None:
    """The address that a host is written as, an IPv4 one that is written as IPv6 as what it is; None for a name."""
    try:
        address = ip_address(host.partition("%")[0])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def _parsed(entry: str) -> _Entry:
    if network := _network(entry):  # IPv6 without brackets, too
        return _Entry(None, network, None)
    match = _ENTRY.fullmatch(entry.lower())
    if match is not None:
        host, port = match[1].replace("[", "").replace("]", ""), None if match[2] is None else int(match[2])
        if port is None or 0 < port < 65536:
            if network := _network(host):
                return _Entry(None, network, port)
            if _NAME.fullmatch(host) and not host.rpartition(".")[2].isdigit():
                return _Entry(host, None, port)
    raise InvalidArgument(
        f"allowed_media_hosts: {entry!r} is no host, address or network, with or without a port; "
        "such are images.example.org, *.example.org, 10.0.0.0/8 and localhost:8080"
    )


def _network(text: str) -> IPv4Network | IPv6Network | None:
    try:
        return ip_network(text, strict=False)
    except ValueError:
        return None
