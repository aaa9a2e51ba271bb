"""No url of a client's leads to an address that is not public: no spelling, no name server, no redirect."""

import asyncio
import contextlib
import datetime as dt
import ipaddress
import socket
import ssl
import traceback
from collections.abc import AsyncIterator, Sequence
from functools import partial
from pathlib import Path

import aiohttp
import pytest
import uvloop
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import example, given
from hypothesis import strategies as st
from yarl import URL

from comfyd.errors import (
    BlockedAddress,
    ComfydError,
    FetchFailed,
    HostNotFound,
    InvalidUrl,
    TooManyRedirects,
)
from comfyd.guard import Guard, Lookup, open_client, parse_allow
from comfyd.guard.client import checked_socket
from tests.support.trap import Script, Trap, answer, hang, open_trap, redirect

PATIENCE = 20.0
OUTSIDE = "127.0.0.2"
"""Plays the public internet: the tests' operators allow it, and only it."""

REFUSED = """
0.0.0.0 0.0.0.1 0.255.255.255 10.0.0.0 10.1.2.3 10.255.255.255 100.64.0.0 100.100.100.200 100.127.255.255
127.0.0.0 127.0.0.1 127.1.2.3 127.255.255.255 168.63.129.16 169.254.0.0 169.254.169.254 169.254.170.2
169.254.255.255 172.16.0.0 172.31.255.255 192.0.0.0 192.0.0.8 192.0.0.9 192.0.0.170 192.0.0.192 192.0.0.255
192.0.2.1 192.88.99.1 192.168.0.0 192.168.1.1 192.168.255.255 198.18.0.0 198.19.255.255 198.51.100.7
203.0.113.9 224.0.0.1 239.255.255.255 240.0.0.0 255.255.255.254 255.255.255.255
:: ::1 ::2 ::127.0.0.1 ::8.8.8.8 ::ffff:127.0.0.1 ::ffff:10.0.0.1 ::ffff:169.254.169.254 ::ffff:a9fe:a9fe
::ffff:0:127.0.0.1 ::ffff:0:8.8.8.8 ::ffff:168.63.129.16 64:ff9b::127.0.0.1 64:ff9b::8.8.8.8 64:ff9b:1::1
64:ff9b:1:ffff:ffff:ffff:ffff:ffff 64:ff9b:2::1 100::1 100:0:0:1::1 100:0:0:2::1 200::1 1fff:ffff::1
2001::1 2001:0:4136:e378:8000:63bf:3fff:fdd2 2001:1::1 2001:2::1 2001:3::1 2001:4:112::1 2001:10::1 2001:20::1
2001:30::1 2001:1ff:ffff::1 2001:db8::1 2001:db8:ffff:ffff::1 2002:: 2002:7f00:1:: 2002:0808:0808::1
3fff::1 3fff:fff:ffff::1 4000::1 5f00::1 8000::1 e000::1 fc00::1 fd00:ec2::254 fdff:ffff::1 fe00::1 fe80::1
fe80::1%eth0 febf:ffff::1 fec0::1 feff::1 ff00::1 ff02::1 ff0e::1 ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff
127.1 0177.0.0.1 0x7f000001 2130706433 localhost example.com 127.0.0.1:80 [::1]
"""

PUBLIC = """
1.0.0.1 1.1.1.1 8.8.8.8 9.255.255.255 11.0.0.0 100.63.255.255 100.128.0.0 126.255.255.255 128.0.0.0
168.63.129.15 168.63.129.17 169.253.255.255 169.255.0.0 172.15.255.255 172.32.0.0 192.0.1.0 192.0.3.0
192.88.98.255 192.167.255.255 192.169.0.0 198.17.255.255 198.20.0.0 203.0.112.255 203.0.114.0 223.255.255.255
::ffff:8.8.8.8 2001:200::1 2001:4860:4860::8888 2001:db7::1 2001:db9::1 2003::1 2400:cb00::1 2606:4700::1111
2606:4700::1111%eth0 2a00:1450::1 3ffe::1 3fff:1000::1
"""

LOOPBACK_HOSTS = """
127.0.0.1 127.0.0.1. 127.1 127.0.1 127.00.0.1 0177.0.0.1 0177.1 0000177.0.0.01 0x7f.0.0.1
0x7f.1 0X7F.0x0.0x0.0x1
0x7f000001 0x7F000001. 2130706433 017700000001 127.0.0.1%00 127.0.0.1%20 %31%32%37.0.0.1 127%2e0%2e0%2e1
127%2E1 0 0.0.0.0 00 0x0 0.0 0x 1e1 ①②⑦.0.0.1 １２７.０.０.１ 127。0。0。1 127．0．0．1 127｡0｡0｡1
⑫⑦.0.0.1 𝟙𝟚𝟟.0.0.1
²¹³⁰⁷⁰⁶⁴³³ ٣.1 [::1] [::] [0:0:0:0:0:0:0:1] [::ffff:127.0.0.1] [::ffff:7f00:1] [0:0:0:0:0:ffff:7f00:1]
[::127.0.0.1] [::ffff:0:127.0.0.1] [64:ff9b::7f00:1] [64:ff9b:1::7f00:1] [2002:7f00:1::] [::1%25lo] [::1%lo]
[::ffff:127.0.0.1%25lo] localhost LOCALHOST localhost. localhost.. ⓛocalhost
ｌocalhost a.localhost localhost%00
name.example x@127.0.0.1 public.example@127.0.0.1 public.example:80@127.0.0.1 @127.0.0.1 :@127.0.0.1
127.0.0.1\\@public.example public.example\\@127.0.0.1 127.0.0.1\\.public.example
"""  # noqa: RUF001 - that they look alike is the point
"""Whatever stands between `http://` and the port, and would lead to this machine; `name.example` by DNS."""


def inside(host: str) -> Lookup:
    """A name server that knows one address for every name."""

    async def lookup(_name: str) -> Sequence[str]:
        return [host]

    return lookup


def in_turn(*answers: Sequence[str]) -> Lookup:
    """A name server that changes its mind."""
    left = list(answers)

    async def lookup(_name: str) -> Sequence[str]:
        return left.pop(0) if len(left) > 1 else left[0]

    return lookup


def failing(error: OSError) -> Lookup:
    """A name server that has no answer."""

    async def lookup(_name: str) -> Sequence[str]:
        raise error

    return lookup


async def got(
    guard: Guard, url: str, lookup: Lookup | None = None, silence: float = 5.0
) -> tuple[int, bytes]:
    """Status and body of a url, by a client of its own."""
    async with (
        asyncio.timeout(PATIENCE),
        open_client(guard, lookup=lookup, silence=silence) as client,
        client.get(url) as reply,
    ):
        body = b""
        while block := await reply.read():
            body += block
        return reply.status, body


@contextlib.asynccontextmanager
async def inner_trap() -> AsyncIterator[list[Trap]]:
    """A trap at 127.0.0.1, and one on the same port at ::1 where this machine has that."""
    async with contextlib.AsyncExitStack() as stack:
        traps = [await stack.enter_async_context(open_trap())]
        with contextlib.suppress(OSError):
            traps.append(await stack.enter_async_context(open_trap(host="::1", port=traps[0].port)))
        yield traps


@pytest.mark.parametrize("address", REFUSED.split())
def test_address_that_is_not_public_is_refused(address: str) -> None:
    assert Guard.of([]).refusal(address)


@pytest.mark.parametrize("address", PUBLIC.split())
def test_public_address_may_be_reached(address: str) -> None:
    assert Guard.of([]).refusal(address) is None


@given(st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)))
def test_what_python_calls_not_global_is_refused(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> None:
    if not address.is_global and getattr(address, "ipv4_mapped", None) is None:
        assert Guard.of([]).refusal(str(address))


@given(st.ip_addresses(v=4))
def test_every_spelling_of_an_address_is_judged_as_its_plain_form(address: ipaddress.IPv4Address) -> None:
    guard, number = Guard.of([]), int(address)
    high, low = divmod(number, 1 << 24)
    spellings = [
        str(number),
        hex(number),
        f"0{number:o}",
        f"{high}.{low}",
        f"0x{high:x}.0{low:o}",
        f"{address}.",
    ]
    for spelling in [*spellings, f"[::ffff:{address}]"]:
        if guard.refusal(str(address)):
            with pytest.raises(BlockedAddress):
                guard.check_url(f"http://{spelling}/")
        else:
            assert guard.refusal(guard.check_url(f"http://{spelling}/").raw_host or "") is None


@pytest.mark.parametrize("host", LOOPBACK_HOSTS.split())
async def test_no_spelling_reaches_this_machine(host: str) -> None:
    guard = Guard.of([])
    async with inner_trap() as traps:
        for url in (f"http://{host}:{traps[0].port}/x", f"http://{host}:{traps[0].port}#@public.example/"):
            with pytest.raises((BlockedAddress, InvalidUrl)):
                await got(guard, url, inside("127.0.0.1"))
        assert [trap.accepted for trap in traps] == [0] * len(traps)


async def test_socket_alone_stops_every_spelling() -> None:
    """Without the check of urls and of what a name server says: aiohttp's own way with only our sockets."""
    factory = partial(checked_socket, Guard.of([]))
    async with inner_trap() as traps:
        connector = aiohttp.TCPConnector(socket_factory=factory, use_dns_cache=False)
        async with asyncio.timeout(PATIENCE), aiohttp.ClientSession(connector=connector) as session:
            for host in LOOPBACK_HOSTS.split():
                if host != "name.example" and "%" not in host and not host.startswith(("a.", "1e1", "0x ")):
                    with pytest.raises((aiohttp.ClientError, ValueError)):
                        await session.get(f"http://{host}:{traps[0].port}/")
        assert [trap.accepted for trap in traps] == [0] * len(traps)


class Blind(Guard):
    """Checks no url, so that only what comes after that can refuse."""

    def check_url(self, url: str) -> URL:
        """Any url is good."""
        return URL(url)


async def test_client_stops_at_the_socket_what_no_check_has_seen() -> None:
    async with inner_trap() as traps:
        for host in (
            "127.0.0.1",
            "[::1]",
            "[::ffff:7f00:1]",
            "127.1",
            "2130706433",
            "localhost",
            "name.example",
        ):
            with pytest.raises((BlockedAddress, InvalidUrl)):
                await got(Blind.of([]), f"http://{host}:{traps[0].port}/", inside("127.0.0.1"))
        assert [trap.accepted for trap in traps] == [0] * len(traps)
        assert await got(Blind.of(["127.0.0.1"]), f"{traps[0].url}/") == (200, b"trapped")


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.1", "0x7f.1", "①②⑦.0.0.1", "localhost", "[::ffff:127.0.0.1]"]
)
async def test_operator_may_allow_a_network(host: str) -> None:
    async with open_trap() as trap:
        assert await got(Guard.of(["127.0.0.0/8"]), f"http://{host}:{trap.port}/") == (200, b"trapped")
        assert trap.accepted == 1


async def test_operator_may_allow_an_ipv6_address() -> None:
    async with inner_trap() as traps:
        if len(traps) == 1:
            pytest.skip("this machine has no ::1")
        assert await got(Guard.of(["::1"]), f"http://[::1]:{traps[0].port}/") == (200, b"trapped")
        assert [trap.accepted for trap in traps] == [0, 1]


@pytest.mark.parametrize("entry", ["inside.example", "INSIDE.example."])
async def test_operator_may_allow_a_name_and_nothing_below_it(entry: str) -> None:
    guard, lookup = Guard.of([entry]), inside("127.0.0.1")
    async with open_trap() as trap:
        assert await got(guard, f"http://Inside.Example.:{trap.port}/", lookup) == (200, b"trapped")
        for other in ("a.inside.example", "example", "xinside.example", "127.0.0.1"):
            with pytest.raises(BlockedAddress):
                await got(guard, f"http://{other}:{trap.port}/", lookup)
        assert trap.accepted == 1


async def test_allowed_localhost_is_looked_up_in_the_system() -> None:
    async with open_trap() as trap:
        assert await got(Guard.of(["localhost"]), f"http://localhost:{trap.port}/") == (200, b"trapped")


async def test_allowed_name_is_no_way_to_other_hosts() -> None:
    async with open_trap() as trap:
        async with open_trap(redirect(f"{trap.url}/"), host=OUTSIDE) as first:
            with pytest.raises(BlockedAddress):
                await got(
                    Guard.of(["inside.example"]), f"http://inside.example:{first.port}/", inside(OUTSIDE)
                )
        assert (first.accepted, trap.accepted) == (1, 0)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize(
    "location",
    [
        "http://127.0.0.1:{port}/",
        "HTTP://127.1:{port}/",
        "//127.0.0.1:{port}/x",
        "//①②⑦.0.0.1:{port}/",
        "http://[::1]:{port}/",
        "http://[::ffff:127.0.0.1]:{port}/",
        "http://localhost:{port}/",
        "http://name.example:{port}/",
        "http://public.example@127.0.0.1:{port}/",
        "http:///\\127.0.0.1:{port}/",
        "file:///etc/passwd",
        "ftp://127.0.0.1:{port}/",
        "http://[",
    ],
)
async def test_no_redirect_leads_inside(status: int, location: str) -> None:
    async with inner_trap() as traps:
        leading = redirect(location.format(port=traps[0].port), status)
        async with open_trap(redirect("/a/../b?c", status), leading, host=OUTSIDE) as first:
            with pytest.raises((BlockedAddress, InvalidUrl)) as caught:
                await got(Guard.of([OUTSIDE]), f"http://{OUTSIDE}:{first.port}/", inside("127.0.0.1"))
        assert OUTSIDE in caught.value.message or "name.example" in location
        assert first.accepted == 2
        assert [trap.accepted for trap in traps] == [0] * len(traps)


@pytest.mark.parametrize(
    "script",
    [
        answer(b'<meta http-equiv="refresh" content="0; url=/x">'),
        answer(Refresh="0; url=/x"),
        answer(Location="/x", Content_Location="/x"),
        answer(b"choose", 300, Location="/x"),
        answer(b"nowhere", 302),
    ],
)
async def test_only_a_redirect_with_a_target_is_followed(script: Script) -> None:
    async with open_trap(script, host=OUTSIDE) as first:
        status, _ = await got(Guard.of([OUTSIDE]), f"http://{OUTSIDE}:{first.port}/")
    assert status in {200, 300, 302}
    assert first.accepted == 1


async def test_three_redirects_are_followed_and_a_fourth_is_not() -> None:
    chain = [redirect(f"/{hop}") for hop in range(3)]
    async with open_trap(*chain, answer(b"there"), host=OUTSIDE) as first:
        assert await got(Guard.of([OUTSIDE]), f"http://{OUTSIDE}:{first.port}/") == (200, b"there")
    async with open_trap(*chain, redirect("/4"), answer(b"there"), host=OUTSIDE) as first:
        with pytest.raises(TooManyRedirects):
            await got(Guard.of([OUTSIDE]), f"http://{OUTSIDE}:{first.port}/")
        assert first.accepted == 4


async def test_name_that_is_rebound_between_two_connections_is_judged_again() -> None:
    async with open_trap(redirect("/again"), host=OUTSIDE) as first, open_trap(port=first.port) as trap:
        lookup = in_turn([OUTSIDE], ["127.0.0.1"])
        with pytest.raises(BlockedAddress):
            await got(Guard.of([OUTSIDE]), f"http://rebound.example:{first.port}/", lookup)
        assert (first.accepted, trap.accepted) == (1, 0)


async def test_of_a_names_addresses_only_the_good_ones_are_tried() -> None:
    async with open_trap(answer(b"outside"), host=OUTSIDE) as first, open_trap(port=first.port) as trap:
        lookup = in_turn(["127.0.0.1", "::1", "127.1", OUTSIDE])
        url = f"http://mixed.example:{first.port}/"
        assert await got(Guard.of([OUTSIDE]), url, lookup) == (200, b"outside")
        with pytest.raises(BlockedAddress):
            await got(Guard.of([]), url, lookup)
        assert (first.accepted, trap.accepted) == (1, 0)
    with pytest.raises(FetchFailed, match="connection refused"):
        await got(Guard.of([OUTSIDE]), url, lookup)


def test_guard_holds_on_the_loop_that_serves() -> None:
    async def attempt() -> int:
        async with inner_trap() as traps:
            for host in ("127.0.0.1", "[::1]", "name.example", "localhost"):
                with pytest.raises(BlockedAddress):
                    await got(Guard.of([]), f"http://{host}:{traps[0].port}/", inside("127.0.0.1"))
            connector = aiohttp.TCPConnector(socket_factory=partial(checked_socket, Guard.of([])))
            async with aiohttp.ClientSession(connector=connector) as session:
                for host in ("127.0.0.1", "[::1]", "localhost"):
                    with pytest.raises(aiohttp.ClientConnectorError, match="refused by the guard"):
                        await session.get(f"http://{host}:{traps[0].port}/")
            assert await got(Guard.of(["127.0.0.1"]), f"{traps[0].url}/") == (200, b"trapped")
            return sum(trap.accepted for trap in traps)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(attempt()) == 1


@pytest.mark.parametrize(
    "url",
    [
        "",
        "x",
        "example.com/a",
        "//example.com/a",
        "ftp://example.com/",
        "file:///etc/passwd",
        "data:image/png;base64,AA==",
        "http:example.com",
        "http:///a",
        "http://",
        "http://:80/",
        "http://user@example.com/",
        "http://user:word@example.com/",
        "http://:word@example.com/",
        "http://example.com:0/",
        "http://example.com:65536/",
        "http://example.com:-1/",
        "http://example.com:x/",
        "http://example.com:80:80/",
        "http://exa mple.com/",
        "http://example.com/a b",
        "http://example.com/\r\nHost: x",
        "http://example.com/\x00",
        "http://example.com/\u202e",
        "http://example.com/\udc80",
        "http://example.com\\a",
        "http://exam%70le.com/",
        "http://example..com/",
        "http://-example.com/",
        "http://example.com../",
        "http://*.example.com/",
        "http://a,b/",
        "http://" + "a" * 64 + ".com/",
        "http://" + "a." * 127 + "com/",
        "http://1.2.3.4.5/",
        "http://256.1.1.1/",
        "http://08.1.1.1/",
        "http://4294967296/",
        "http://example.1/",
        "http://[::1/",
        "http://[::g]/",
        "http://[2606:4700::1111%25eth0]/",
        "http://example.com/" + "a" * 4096,
    ],
)
def test_what_is_no_url_for_us_is_known_at_once(url: str) -> None:
    with pytest.raises(InvalidUrl):
        Guard.of(["example.com"]).check_url(url)


@pytest.mark.parametrize(
    ("url", "asked"),
    [
        ("HTTP://Example.COM", "http://example.com/"),
        ("https://example.com:443/a", "https://example.com/a"),
        ("http://example.com:8080/a#fragment", "http://example.com:8080/a"),
        ("http://ex_ample.com/", "http://ex_ample.com/"),
        ("http://8.8.8.8.:80/", "http://8.8.8.8/"),
        ("http://0x08080808/", "http://8.8.8.8/"),
        ("http://[2606:4700:0::1111]:81/a", "http://[2606:4700::1111]:81/a"),
        ("http://bücher.example/", "http://xn--bcher-kva.example/"),
        ("http://example.com/bücher?ü", "http://example.com/b%C3%BCcher?%C3%BC"),
        (
            "http://example.com/a%2fb%7e/../c?X-Sig=a%2Fb+c%7E'(;)&e=%zz",
            "http://example.com/a%2fb%7e/../c?X-Sig=a%2Fb+c%7E'(;)&e=%zz",
        ),
    ],
)
def test_host_is_normal_and_the_rest_is_the_clients_own(url: str, asked: str) -> None:
    assert str(Guard.of([]).check_url(url)) == asked


@given(
    st.text(st.characters(codec=None), max_size=60), st.sampled_from(["http://", "https://", "http://[", ""])
)
@example("①②⑦.1/?%7e", "http://")
@example("::ffff:8.8.8.8]:80?ü", "http://[")
def test_any_text_is_judged_and_a_good_url_stays_as_it_is(text: str, start: str) -> None:
    guard = Guard.of([])
    try:
        checked = guard.check_url(start + text)
    except (InvalidUrl, BlockedAddress):
        return
    assert guard.check_url(str(checked)) == checked


@pytest.mark.parametrize(
    ("current", "location", "target"),
    [
        ("http://a.example/b/c?d", "e", "http://a.example/b/e"),
        ("http://a.example/b/c?d", "?e=%7e", "http://a.example/b/c?e=%7e"),
        ("http://a.example/b/c", "//b.example", "http://b.example/"),
        ("http://a.example/b", "https://b.example:8443/c", "https://b.example:8443/c"),
        ("https://a.example/b", "//b.example/a b ", "https://b.example/a%20b"),
        ("http://a.example/b", "#c", "http://a.example/b"),
    ],
)
def test_redirect_is_read_relative_to_where_it_came_from(current: str, location: str, target: str) -> None:
    assert str(Guard.of([]).follow(URL(current), location)) == target


@pytest.mark.parametrize("rest", ["//][v1.a]1@", "//][v1.a]1@/hook", "//éx[]%:%@", "//[v]]:@"])
def test_brackets_that_confuse_the_parser_are_no_url(rest: str) -> None:
    with pytest.raises(InvalidUrl, match="not a url"):
        Guard.of([]).check_url(f"http:{rest}")
    with pytest.raises(InvalidUrl, match=r"^a\.example redirects to something that is not a url"):
        Guard.of([]).follow(URL("http://a.example/"), rest)


def test_redirect_from_https_to_http_is_refused() -> None:
    with pytest.raises(InvalidUrl, match="from https to http"):
        Guard.of([]).follow(URL("https://a.example/"), "http://a.example/")


@pytest.mark.parametrize(
    "entry",
    [
        "",
        "a b",
        "10.0.0.0/33",
        "10.0.0.5/8",
        "127.1",
        "http://x/",
        "x/y",
        "x:80",
        "[::1]",
        "*.example.com",
        "a..b",
        "%",
    ],
)
def test_junk_in_the_allow_list_is_named(entry: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - its words are looked at below
        parse_allow(["10.0.0.0/8", entry])
    assert repr(entry) in str(caught.value)


@pytest.mark.parametrize(
    ("entry", "address"),
    [
        ("10.0.0.0/8", "10.9.9.9"),
        ("10.0.0.0/8", "::ffff:10.9.9.9"),
        ("::ffff:10.0.0.0/104", "10.9.9.9"),
        ("192.168.1.5", "192.168.1.5"),
        ("fd00::/8", "fd12::1"),
        ("fe80::/10", "fe80::1%eth0"),
        ("64:ff9b::/96", "64:ff9b::808:808"),
    ],
)
def test_allowed_network_goes_before_the_table(entry: str, address: str) -> None:
    assert Guard.of([entry]).refusal(address) is None
    assert Guard.of([]).refusal(address)
    assert Guard.of([entry]).refusal("169.254.169.254")


def test_allowed_name_is_compared_in_ascii() -> None:
    guard = Guard.of(["Büro.Example."])
    assert guard.allows_name("XN--bro-hoa.example")
    assert not guard.allows_name("buro.example")


async def test_post_sends_its_body_and_follows_nothing() -> None:
    async with (
        asyncio.timeout(PATIENCE),
        open_trap(redirect("/other", 307), host=OUTSIDE) as first,
        open_client(Guard.of([OUTSIDE])) as client,
    ):
        url = f"http://{OUTSIDE}:{first.port}/hook?a=%2f"
        async with client.post(url, b'{"a": 1}', {"Content-Type": "application/json"}) as reply:
            assert reply.status == 307
        with pytest.raises(BlockedAddress):
            async with client.post(f"http://127.0.0.1:{first.port}/", b"", {}):
                pass
    assert first.accepted == 1
    assert first.bodies == [b'{"a": 1}']
    assert first.heads[0].startswith(b"POST /hook?a=%2f HTTP/1.1\r\n")
    assert b"Content-Type: application/json\r\n" in first.heads[0]


async def test_request_carries_nothing_over(monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_trap() as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        monkeypatch.setenv("all_proxy", proxy.url)
        script = answer(b"x", Set_Cookie="a=b; Path=/")
        async with open_trap(script, host=OUTSIDE) as first, open_client(Guard.of([OUTSIDE])) as client:
            for _ in range(2):
                async with client.get(f"http://{OUTSIDE}:{first.port}/a%2f?b=%7e#c") as reply:
                    assert await reply.read() == b"x"
    assert (first.accepted, proxy.accepted) == (2, 0)
    for head in first.heads:
        assert head.startswith(b"GET /a%2f?b=%7e HTTP/1.1\r\n")
        assert b"Accept-Encoding: identity\r\n" in head
        assert b"\r\nCookie:" not in head
        assert b"\r\nConnection: close\r\n" in head


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (socket.gaierror(socket.EAI_NONAME, "unknown"), HostNotFound),
        (socket.gaierror(socket.EAI_AGAIN, "try again"), FetchFailed),
        (OSError("odd"), HostNotFound),
    ],
)
async def test_name_without_an_address_is_told_from_a_name_server_that_is_down(
    error: OSError, kind: type[ComfydError]
) -> None:
    with pytest.raises(kind, match=r"^name\.example "):
        await got(Guard.of([]), "http://name.example/", failing(error))


async def test_name_with_no_addresses_is_not_found() -> None:
    with pytest.raises(HostNotFound):
        await got(Guard.of([]), "http://name.example/", in_turn([]))


async def test_server_that_is_silent_or_breaks_off_or_refuses_is_a_failure_that_may_pass() -> None:
    async def garbage(writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-2.0-OpenSSH\r\n\r\n")
        await writer.drain()

    async def abort(writer: asyncio.StreamWriter) -> None:
        writer.transport.abort()

    guard = Guard.of([OUTSIDE])
    for script, words in ((hang, "does not answer"), (garbage, "does not speak HTTP"), (abort, "broke off")):
        async with open_trap(script, host=OUTSIDE) as first:
            with pytest.raises(FetchFailed, match=words) as caught:
                await got(guard, f"http://{OUTSIDE}:{first.port}/", silence=0.2)
            assert caught.value.retryable
    async with open_trap(host=OUTSIDE) as gone:
        pass
    with pytest.raises(FetchFailed, match="connection refused"):
        await got(guard, f"http://{OUTSIDE}:{gone.port}/")


def self_signed(folder: Path) -> ssl.SSLContext:
    """A server's side of TLS that nobody has reason to trust."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, OUTSIDE)])
    start = dt.datetime(2020, 1, 1, tzinfo=dt.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + dt.timedelta(days=36_500))
        .sign(key, hashes.SHA256())
    )
    file = folder / "server.pem"
    file.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        + certificate.public_bytes(serialization.Encoding.PEM)
    )
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(file)
    return context


async def test_certificate_that_nobody_vouches_for_is_refused_for_good(tmp_path: Path) -> None:
    async with open_trap(host=OUTSIDE, tls=self_signed(tmp_path)) as first:
        with pytest.raises(FetchFailed, match="certificate") as caught:
            await got(Guard.of([OUTSIDE]), f"https://{OUTSIDE}:{first.port}/")
    assert not caught.value.retryable
    assert not first.heads


async def test_tls_to_a_server_that_has_none_fails() -> None:
    async def greet(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 mail.example ESMTP\r\n")
        writer.close()

    server = await asyncio.start_server(greet, OUTSIDE, 0)
    async with server:
        with pytest.raises(FetchFailed, match="no TLS") as caught:
            await got(Guard.of([OUTSIDE]), f"https://{OUTSIDE}:{server.sockets[0].getsockname()[1]}/")
    assert caught.value.retryable


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/SECRET?SECRET#SECRET",
        "http://SECRET:SECRET@example.com/",
        "http://name.example/SECRET?SECRET",
        "http://127.0.0.2:{port}/SECRET?SECRET",
        "http://127.0.0.2:1/SECRET?SECRET",
        "http://example.com:x/SECRET?SECRET",
        "ftp://example.com/SECRET",
        "http://example.com/SECRET?\\SECRET",
    ],
)
async def test_no_error_shows_what_a_url_may_be_signed_with(url: str) -> None:
    async def garbage(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 2x0 OK\r\n\r\n")
        await writer.drain()

    async with open_trap(garbage, host=OUTSIDE) as first:
        with pytest.raises(ComfydError) as caught:
            await got(Guard.of([OUTSIDE]), url.format(port=first.port), inside("10.0.0.1"))
    shown = "".join(traceback.format_exception(caught.value)) + repr(caught.value.details)
    assert "SECRET" not in shown
    assert "10.0.0.1" not in caught.value.message
