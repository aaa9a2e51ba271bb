"""Where a url that a client gives may lead; never connects and never asks a name server."""

import ipaddress
import re
from collections.abc import Sequence
from ipaddress import IPv4Network, IPv6Network
from typing import Final, Self, TypeAlias

import msgspec
from yarl import URL

from comfyd.errors import BlockedAddress, InvalidUrl
from comfyd.guard.addresses import literal, not_public, parse

Network: TypeAlias = IPv4Network | IPv6Network

LONGEST_URL: Final = 4096
"""Characters."""
_LONGEST_NAME: Final = 253
_NAME: Final = re.compile(
    r"(?:[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?\.)*[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
)
_LOOPBACK: Final = ("127.0.0.1", "::1")


class Allowed(msgspec.Struct, frozen=True, kw_only=True):
    """What operators let clients reach beside the public internet."""

    networks: tuple[Network, ...] = ()
    names: frozenset[str] = frozenset()
    """In ASCII, lower case, without a dot at the end."""


def parse_allow(entries: Sequence[str]) -> Allowed:
    """Read `outbound.allow`: networks (`10.0.0.0/8`), addresses, and host names (each only itself).

    Raises `ValueError`, which names the entry and what to write instead.
    """
    networks: list[Network] = []
    names: set[str] = set()
    for entry in entries:
        network = _network(entry)
        if network is None:
            names.add(_name(entry))
        else:
            networks.append(network)
    return Allowed(networks=tuple(networks), names=frozenset(names))


class Guard:
    """Says no to whatever leads to a place that is neither public nor allowed. Immutable."""

    def __init__(self, allowed: Allowed) -> None:
        self._allowed = allowed

    @classmethod
    def of(cls, allow: Sequence[str]) -> Self:
        """A guard with these entries of `outbound.allow`. Raises as `parse_allow`."""
        return cls(parse_allow(allow))

    def refusal(self, address: str) -> str | None:
        """Why this address of a socket (`sockaddr[0]`) may not be reached, in a few words; None if it may."""
        try:
            parsed = parse(address)
        except ValueError:
            return "not an address"
        if any(parsed in network for network in self._allowed.networks):
            return None
        return not_public(parsed)

    def allows_name(self, host: str) -> bool:
        """Whether operators allow this ASCII host, whatever its address."""
        return host.removesuffix(".").lower() in self._allowed.names

    def check_url(self, url: str) -> URL:
        """The url as it is requested, if nothing is wrong that can be seen without a name server.

        Its path and query are the client's own to the last character, since they may be signed; its host is
        in the one plain form; its fragment is gone. Raises `InvalidUrl` and `BlockedAddress`; their messages
        name the host and nothing else of the url.
        """
        if len(url) > LONGEST_URL:
            raise InvalidUrl(f"a url may have {LONGEST_URL} characters; this one has {len(url)}")
        if not url.isprintable() or " " in url or "\\" in url:
            raise InvalidUrl(
                "a url holds no blanks, control characters or backslashes; write them as %20 and so on"
            )
        try:
            normal, exact = URL(url), URL(url, encoded=True)
        except (
            ValueError,
            IndexError,
        ):  # yarl's second one is of some hosts in brackets; words may show a password
            raise InvalidUrl("this is not a url: its host or its port is malformed") from None
        if normal.scheme not in {"http", "https"}:
            raise InvalidUrl("a url has to begin with http:// or https://")
        if normal.raw_user is not None or normal.raw_password is not None:
            raise InvalidUrl("a url may hold no user and no password")
        host = self._checked_host(normal.raw_host or "")
        if normal.port == 0:
            raise InvalidUrl(f"{host} has no port 0")
        own = exact if (exact.raw_path + exact.raw_query_string).isascii() else normal
        return URL.build(
            scheme=normal.scheme,
            host=host,
            port=normal.explicit_port,
            path=own.raw_path,
            query_string=own.raw_query_string,
            encoded=True,
        )

    def follow(self, current: URL, location: str) -> URL:
        """Where a redirect leads. Raises as `check_url`.

        From https it leads to https only: what was asked for over TLS is not taken from somebody in between.
        """
        host = current.raw_host
        try:
            # Many servers forget to quote blanks, and every browser forgives it.
            target = current.join(URL(location.strip().replace(" ", "%20"), encoded=True))
            checked = self.check_url(str(target))
        except (ValueError, IndexError):
            raise InvalidUrl(f"{host} redirects to something that is not a url") from None
        except (InvalidUrl, BlockedAddress) as error:
            raise type(error)(f"{host} redirects: {error.message}", details=error.details) from None
        if current.scheme == "https" and checked.scheme != "https":
            raise InvalidUrl(f"{host} redirects from https to http at {checked.raw_host}")
        return checked

    def _checked_host(self, host: str) -> str:
        """The host in its plain form, as a url has it. Raises as `check_url`."""
        if not host:
            raise InvalidUrl("a url has to name a host, as in http://example.com/picture.png")
        neither = f"the host of a url has to be a name or an address, and {host[:100]!r} is neither"
        try:
            address = literal(host)
        except ValueError:
            raise InvalidUrl(neither) from None
        if "%" in host or (address is None and not _is_name(host)):
            raise InvalidUrl(neither)
        if address is not None:
            reason = self.refusal(str(address))
        elif _is_loopback(host) and not self.allows_name(host):
            reason = "loopback" if all(map(self.refusal, _LOOPBACK)) else None
        else:
            reason = None
        if reason is not None:
            raise blocked(host, reason)
        return host if address is None else f"[{address}]" if address.version == 6 else str(address)


def blocked(host: str, reason: str) -> BlockedAddress:
    """The refusal of a host. It does not name the address of a name: how a network is laid out is no client's
    business.
    """
    return BlockedAddress(
        f"{host} is not public ({reason}), and the operator does not allow it in outbound.allow",
        details={"host": host, "reason": reason},
    )


def _is_name(host: str) -> bool:
    name = host.removesuffix(".").lower()
    return len(name) <= _LONGEST_NAME and _NAME.fullmatch(name) is not None


def _is_loopback(host: str) -> bool:
    name = host.removesuffix(".").lower()
    return name == "localhost" or name.endswith(".localhost")


def _network(entry: str) -> Network | None:
    """The network or address that an entry is; None for what may be a name. Raises `ValueError`."""
    try:
        network = ipaddress.ip_network(entry)
    except ValueError:
        if "/" in entry:
            raise ValueError(_advice(entry)) from None
        return None
    if isinstance(network, IPv6Network) and network.prefixlen >= 96:
        inner = network.network_address.ipv4_mapped
        if inner is not None:
            return IPv4Network((inner, network.prefixlen - 96))
    return network


def _advice(entry: str) -> str:
    try:
        meant = ipaddress.ip_network(entry, strict=False)
    except ValueError:
        return f"{entry!r} is not a network, such as 10.0.0.0/8; of a url, write only the host"
    return f"{entry!r} is an address inside of a network; the network is {str(meant)!r}"


def _name(entry: str) -> str:
    """A host name in ASCII, lower case, without a dot at the end. Raises `ValueError`."""
    wrong = f"{entry!r} is no network, no address and no host name (without port and without *)"
    try:
        host = URL.build(scheme="http", host=entry).raw_host or ""
        if literal(host) is None and _is_name(host):
            return host.removesuffix(".").lower()
    except (ValueError, IndexError):
        raise ValueError(wrong) from None
    raise ValueError(wrong)
