"""Which addresses are public, and how a host spells one; never asks a name server.

The tables are IANA's special-purpose registries (RFC 6890, as of 2025) less what is globally reachable, with
what else leads inside: addresses that carry another one, multicast, and the host agent of Azure.
`ipaddress.is_global` is not asked, because its answers differ from one patch release of Python to the next.
"""

import re
import socket
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
)
from typing import Final, TypeAlias

Address: TypeAlias = IPv4Address | IPv6Address

_IPV4: Final = tuple(
    (IPv4Network(network), reason)
    for network, reason in (
        ("0.0.0.0/8", "unspecified"),
        ("10.0.0.0/8", "private"),
        ("100.64.0.0/10", "shared by the customers of a provider"),
        ("127.0.0.0/8", "loopback"),
        ("168.63.129.16/32", "the host agent of Azure"),
        ("169.254.0.0/16", "link-local"),
        ("172.16.0.0/12", "private"),
        ("192.0.0.0/24", "reserved for protocols"),
        ("192.0.2.0/24", "for documentation"),
        ("192.88.99.0/24", "a tunnel (6to4)"),
        ("192.168.0.0/16", "private"),
        ("198.18.0.0/15", "for benchmarks"),
        ("198.51.100.0/24", "for documentation"),
        ("203.0.113.0/24", "for documentation"),
        ("224.0.0.0/4", "multicast"),
        ("255.255.255.255/32", "broadcast"),
        ("240.0.0.0/4", "reserved"),
    )
)
"""The first one that holds an address says what it is."""

_IPV6: Final = tuple(
    (IPv6Network(network), reason)
    for network, reason in (
        ("::/128", "unspecified"),
        ("::1/128", "loopback"),
        ("::/96", "an IPv4 address in disguise"),
        ("::ffff:0:0:0/96", "an IPv4 address in disguise"),
        ("64:ff9b::/96", "a translation to IPv4 (NAT64)"),
        ("64:ff9b:1::/48", "a translation to IPv4 (NAT64)"),
        ("100::/63", "discarded"),
        ("2001::/32", "a tunnel (Teredo)"),
        ("2001:2::/48", "for benchmarks"),
        ("2001:db8::/32", "for documentation"),
        # The rest of it is anycast of protocols and identifiers: nothing there serves files.
        ("2001::/23", "reserved for protocols"),
        ("2002::/16", "a tunnel (6to4)"),
        ("3fff::/20", "for documentation"),
        ("5f00::/16", "for segment routing"),
        ("fc00::/7", "private"),
        ("fe80::/10", "link-local"),
        ("fec0::/10", "site-local"),
        ("ff00::/8", "multicast"),
    )
)
_GLOBAL_UNICAST: Final = IPv6Network("2000::/3")
"""All that was ever given out; what IANA may still open is not public today."""

_NUMBER: Final = re.compile(r"[0-9]+|0x[0-9a-f]*", re.IGNORECASE)
_NUMBERS: Final = re.compile(r"[0-9a-fx.]+", re.IGNORECASE)


def parse(address: str) -> Address:
    """An address in its one plain form, as in a socket address, perhaps with a `%scope`.

    IPv4 that comes as IPv6 is IPv4. Raises `ValueError`.
    """
    parsed = ip_address(address.partition("%")[0])
    return (parsed.ipv4_mapped or parsed) if isinstance(parsed, IPv6Address) else parsed


def not_public(address: Address) -> str | None:
    """What an address is if it is not public, in a few words; None for a public one."""
    if isinstance(address, IPv4Address):
        return next((reason for network, reason in _IPV4 if address in network), None)
    found = next((reason for network, reason in _IPV6 if address in network), None)
    return found or (None if address in _GLOBAL_UNICAST else "not assigned")


def literal(host: str) -> Address | None:
    """The address that an ASCII host is, in any spelling that a system takes for one; None for a name.

    Beside the plain form these are numbers in decimal, octal (`0177`) or hexadecimal (`0x7f`), of which the
    last may stand for several bytes, and a dot at the end. Raises `ValueError` for what can be neither: a
    name never ends in a number (the rule of browsers).
    """
    if ":" in host:
        return parse(host)
    name = host.removesuffix(".")
    if not _NUMBER.fullmatch(name.rpartition(".")[2]):
        return None
    if not _NUMBERS.fullmatch(name):
        raise ValueError("not an address")
    try:
        return IPv4Address(socket.inet_aton(name))
    except OSError:
        raise ValueError("not an address") from None
