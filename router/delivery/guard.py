"""Which addresses a delivery may be sent to, decided by what a name resolves to when a connection is made: a
URL that is typed wrong, or made up by somebody, must not reach what only this machine can. Pure.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from typing import Final

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_NAT64: Final = (ipaddress.IPv6Network("64:ff9b::/96"), ipaddress.IPv6Network("64:ff9b:1::/48"))
_COMPATIBLE: Final = ipaddress.IPv6Network("::/96")  # RFC 4291, 2.5.5.1
_SHARED: Final = ipaddress.IPv4Network("100.64.0.0/10")  # RFC 6598
# Where clouds keep credentials of a machine, beside link-local ones: Alibaba, Oracle; AWS and GCP for IPv6.
_METADATA: Final = frozenset(
    map(ipaddress.ip_address, ("100.100.100.200", "192.0.0.192", "fd00:ec2::254", "fd20:ce::254"))
)


def refusal(address: str, *, allow_private: bool) -> str | None:
    """Why nothing is sent to this address; None: it may be.

    Private are loopback, the networks of RFC 1918 and their like. With `allow_private` they may be reached;
    addresses of cloud metadata, link-local ones and what is no address of one host never.
    """
    try:
        written = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return "it is no address"
    for one in _meant(written):
        if one in _METADATA or one.is_link_local:
            return f"{address} is an address of cloud metadata, or link-local"
        if one.is_unspecified or one.is_multicast or one == ipaddress.IPv4Address("255.255.255.255"):
            return f"{address} is no address of one host"
        if not allow_private and not _is_public(one):
            return f"{address} is private"
    return None


def _is_public(address: Address) -> bool:
    if isinstance(address, ipaddress.IPv4Address) and address in _SHARED:
        return False
    return address.is_global and not address.is_reserved


def _meant(address: Address) -> Iterator[Address]:
    """The address, and the IPv4 ones that are written into it."""
    if isinstance(address, ipaddress.IPv4Address):
        yield address
        return
    inner = [address.ipv4_mapped, address.sixtofour]
    if address.teredo is not None:
        inner += address.teredo
    if any(address in network for network in _NAT64) or (address in _COMPATIBLE and int(address) > 0xFFFF):
        inner.append(ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF))
    found: list[Address] = [one for one in inner if one is not None]
    yield from found or [address]
