"""What is sent, what each answer means, and that no receiver is reached that may not be."""

import asyncio
import socket
import time
from collections.abc import Sequence

import pytest

from comfyd import __version__
from comfyd.deliveries import Delivery
from comfyd.errors import StorageError
from comfyd.webhooks import Sender
from comfyd.webhooks.schedule import Answer
from comfyd.webhooks.sender import ERROR_LENGTH, READ_BYTES
from tests.support.trap import Script, answer, hang, head, open_trap, redirect
from tests.webhooks.rig import OLD_SECRET, SECRET, delivery, receiver, render, sending

PATIENCE = 20.0


async def sent(sender: Sender, url: str) -> Answer:
    """What comes of one message to this url."""
    async with asyncio.timeout(PATIENCE):
        return await sender.send(url, await sender.write(delivery(url)))


async def answered(script: Script, **facts: float) -> Answer:
    """The same for a server that answers by script."""
    async with open_trap(script) as trap, sending(**facts) as sender:  # type: ignore[arg-type] # only the timeout
        return await sent(sender, f"{trap.url}/hook")


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_a_receiver_gets_what_standard_webhooks_say(host: str) -> None:
    async with receiver(host=host, secrets=(SECRET, OLD_SECRET)) as made:
        url = made.url + "?key=%2Fsecret"
        async with sending(old_secrets=(OLD_SECRET,)) as sender:
            came = await sent(sender, url)
        (heard,) = made.heard
        assert made.verified == 2
    assert came == Answer(status=204)
    assert heard.path == "/hook?key=%2Fsecret"
    assert heard.body == await render(delivery(url))
    assert heard.headers["content-type"] == "application/json"
    assert heard.headers["user-agent"] == f"comfyd/{__version__}"
    assert heard.message_id == "msg_1"
    assert abs(int(heard.headers["webhook-timestamp"]) - time.time()) < 60


@pytest.mark.parametrize("status", [200, 201, 202, 204, 299])
async def test_every_2xx_counts(status: int) -> None:
    assert await answered(answer(status=status)) == Answer(status=status)


@pytest.mark.fault(28)
@pytest.mark.parametrize("status", [400, 401, 404, 408, 410, 500, 502, 599])
async def test_everything_else_does_not(status: int) -> None:
    assert await answered(answer(b"no", status)) == Answer(status=status, error=f"it answered {status}")


@pytest.mark.fault(31)
async def test_the_wish_of_a_receiver_is_handed_on() -> None:
    came = await answered(answer(b"", 429, Retry_After="17"))
    assert came == Answer(status=429, error="it answered 429", retry_after="17")


@pytest.mark.fault(30)
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_no_redirect_is_followed(status: int) -> None:
    async with open_trap() as inside:
        for location in (f"{inside.url}/", f"http://localhost:{inside.port}/", "http://169.254.169.254/"):
            came = await answered(redirect(location, status))
            assert came.status == status
            assert came.error == f"it answered {status}, a redirect, which is not followed"
        assert inside.accepted == 0


@pytest.mark.fault(30)
async def test_a_receiver_inside_is_not_reached_whatever_its_name_says() -> None:
    async def inside_dns(_host: str) -> Sequence[str]:
        return ["127.0.0.1"]

    async with open_trap() as inside, sending(allow=(), lookup=inside_dns) as sender:
        for host in ("127.0.0.1", "[::ffff:127.0.0.1]", "2130706433", "localhost", "receiver.example"):
            came = await sent(sender, f"http://{host}:{inside.port}/hook?key=hidden")
            assert came.status is None
            assert not came.hopeless
            assert came.error is not None
            assert "is not public" in came.error
            assert "hidden" not in came.error
            assert host != "receiver.example" or "127.0.0.1" not in came.error
        assert inside.accepted == 0


@pytest.mark.parametrize("url", ["ftp://example.com/", "http://me:pw@example.com/", "http://", "nonsense"])
async def test_a_url_that_can_never_be_reached_is_hopeless(url: str) -> None:
    async with sending() as sender:
        came = await sent(sender, url)
    assert came.hopeless
    assert came.status is None
    assert "pw" not in (came.error or "")


@pytest.mark.fault(28)
async def test_a_receiver_that_is_not_there_is_named_in_one_line() -> None:
    async def no_dns(_host: str) -> Sequence[str]:
        raise socket.gaierror(socket.EAI_NONAME, "none")

    async with open_trap() as trap:
        closed = trap.url
    async with sending(lookup=no_dns) as sender:
        refused = await sent(sender, f"{closed}/secret-path")
        unknown = await sent(sender, "http://receiver.example/secret-path")
    assert refused.error == "127.0.0.1 cannot be connected to: connection refused"
    assert unknown.error == "receiver.example has no address: there is no such host name"
    assert not refused.hopeless
    assert not unknown.hopeless


@pytest.mark.fault(28)
async def test_a_receiver_that_breaks_off_or_speaks_no_http_fails() -> None:
    async def cut(_writer: object) -> None:
        """Close without a word."""

    async def babble(writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-2.0-hello\r\n\r\n")
        await writer.drain()

    assert (await answered(cut)).error == "127.0.0.1 broke off"
    assert (await answered(babble)).error == "127.0.0.1 does not speak HTTP"


@pytest.mark.fault(29)
async def test_a_receiver_has_only_so_long_to_answer() -> None:
    async def drip(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n")
        while True:
            writer.write(b"A: b\r\n")
            await writer.drain()
            await asyncio.sleep(0.05)

    for script in (hang, drip):
        begun = time.monotonic()
        came = await answered(script, timeout=0.3)
        assert came.error == "it did not answer within 0.3 seconds"
        assert time.monotonic() - begun < 5


@pytest.mark.fault(29)
async def test_only_the_status_counts_however_long_or_broken_the_rest_is() -> None:
    written = 0

    async def endless(writer: asyncio.StreamWriter) -> None:
        nonlocal written
        writer.write(head(200, {"Content-Length": str(10**12)}))
        while True:
            writer.write(b"x" * 65_536)
            written += 65_536
            await writer.drain()

    async def silent(writer: asyncio.StreamWriter) -> None:
        writer.write(head(202, {"Content-Length": "10"}))
        await hang(writer)

    assert await answered(endless) == Answer(status=200)
    assert written < READ_BYTES + 16 * 1024 * 1024
    assert await answered(answer(b"short", length=100)) == Answer(status=200)
    assert await answered(silent) == Answer(status=202)


async def test_no_error_is_longer_than_a_line() -> None:
    async with sending(allow=()) as sender:
        came = await sent(sender, f"http://{'x' * 5000}/")
        assert len(came.error or "") <= ERROR_LENGTH
        assert "\n" not in (came.error or "")


async def test_a_message_that_cannot_be_written_in_time_is_not_sent() -> None:
    async def stuck(_owed: Delivery) -> bytes:
        await asyncio.Event().wait()
        raise AssertionError

    async def broken(_owed: Delivery) -> bytes:
        raise StorageError("the storage signs no urls now")

    async with sending(write=stuck, timeout=0.05) as sender:
        with pytest.raises(TimeoutError):
            await sender.write(delivery("http://127.0.0.1/"))
    async with sending(write=broken) as sender:
        with pytest.raises(StorageError):
            await sender.write(delivery("http://127.0.0.1/"))
