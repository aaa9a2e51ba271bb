"""A bare client for the conformance tests: what goes in and out of a ComfyUI server, as it is.

It interprets no more than it must to wait for an end, and never uses comfyd's own client, so that a
misunderstanding there cannot hide here. Every wait is bounded.
"""

from __future__ import annotations

import asyncio
import json
import struct
import uuid
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import aiohttp

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence

    from multidict import CIMultiDictProxy

Graph = dict[str, dict[str, Any]]

PATIENCE: Final = 40.0  # seconds; far above what anything here takes, even on a busy machine

SHORT_NAMES: Final = {
    "execution_start": "start",
    "execution_success": "success",
    "execution_error": "error",
    "execution_interrupted": "interrupted",
}


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the server under test is, found out by asking it.

    `modern` (there is a jobs API) stands for the behaviour of 0.33.0, otherwise it is that of 0.3.75.
    """

    modern: bool


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One HTTP response, read to its end."""

    status: int
    headers: CIMultiDictProxy[str]
    body: bytes

    def json(self) -> Any:
        """The body as Python's lenient JSON (NaN and Infinity included, as ComfyUI writes them)."""
        return json.loads(self.body)


@dataclass(frozen=True, kw_only=True)
class Message:
    """One WebSocket message: `kind` is its type, or `binary`; `data` is what it carries."""

    kind: str
    data: dict[str, Any]
    frame: bytes = b""

    @property
    def prompt_id(self) -> str | None:
        """The prompt it names, if it names one."""
        found = self.data.get("prompt_id")
        return None if found is None else str(found)

    @property
    def token(self) -> str:
        """The message in a few words, such as `executing 9`, for comparing sequences."""
        if self.kind == "status":
            return f"status {self.data['status']['exec_info']['queue_remaining']}"
        if self.kind == "execution_cached":
            return " ".join(["cached", *sorted(self.data["nodes"])])
        if self.kind == "executing":
            return f"executing {self.data['node'] or 'null'}"
        if self.kind == "executed":
            return f"executed {self.data['node']}"
        if self.kind == "progress":
            return f"progress {self.data['node']} {self.data['value']}/{self.data['max']}"
        if self.kind == "progress_state":
            nodes = self.data["nodes"]
            return " ".join(["state", *(f"{node}={nodes[node]['state']}" for node in sorted(nodes))])
        if self.kind == "binary":
            return f"binary {struct.unpack_from('>I', self.frame)[0]}"
        return SHORT_NAMES.get(self.kind, self.kind)


def tokens(messages: Sequence[Message]) -> list[str]:
    """The sequence in words."""
    return [message.token for message in messages]


def ends(prompt_id: str) -> Callable[[Message], bool]:
    """True for the message that ends this prompt: `executing` with node null."""

    def is_end(message: Message) -> bool:
        return message.kind == "executing" and message.data["node"] is None and message.prompt_id == prompt_id

    return is_end


def status_is(remaining: int) -> Callable[[Message], bool]:
    """True for a `status` with that many prompts remaining."""
    return lambda message: message.token == f"status {remaining}"


def token_is(token: str) -> Callable[[Message], bool]:
    """True for a message that reads so."""
    return lambda message: message.token == token


def kind_is(kind: str) -> Callable[[Message], bool]:
    """True for a message of that type."""
    return lambda message: message.kind == kind


class Socket:
    """One WebSocket connection; everything received so far is in `messages`."""

    def __init__(self, connection: aiohttp.ClientWebSocketResponse, client_id: str) -> None:
        self.client_id = client_id
        self.messages: list[Message] = []
        self._connection = connection

    async def receive(self) -> Message:
        """The next message; pings are not answered here because a server never sends one."""
        async with asyncio.timeout(PATIENCE):
            received = await self._connection.receive()
        if received.type == aiohttp.WSMsgType.BINARY:
            message = Message(kind="binary", data={}, frame=received.data)
        elif received.type == aiohttp.WSMsgType.TEXT:
            document = json.loads(received.data)
            message = Message(kind=document["type"], data=document["data"])
        else:
            raise ConnectionError(f"the server sent {received.type!r}")
        self.messages.append(message)
        return message

    async def until(self, condition: Callable[[Message], bool]) -> list[Message]:
        """Receive until a message fits; gives the messages received by this call, that one included."""
        got = len(self.messages)
        async with asyncio.timeout(PATIENCE):
            while not condition(await self.receive()):
                pass
        return self.messages[got:]

    async def pending(self) -> list[Message]:
        """Everything the server sent before it answered a ping that is sent now."""
        got = len(self.messages)
        await self._connection.ping(b"mark")
        async with asyncio.timeout(PATIENCE):
            while True:
                received = await self._connection.receive()
                if received.type == aiohttp.WSMsgType.PONG:
                    return self.messages[got:]
                if received.type == aiohttp.WSMsgType.BINARY:
                    self.messages.append(Message(kind="binary", data={}, frame=received.data))
                elif received.type == aiohttp.WSMsgType.TEXT:
                    document = json.loads(received.data)
                    self.messages.append(Message(kind=document["type"], data=document["data"]))
                else:
                    raise ConnectionError(f"the server sent {received.type!r}")

    async def say(self, text: str) -> None:
        """Send one text frame."""
        await self._connection.send_str(text)

    async def announce_previews(self) -> Message:
        """The feature-flag handshake; gives the server's reply."""
        await self.say('{"type": "feature_flags", "data": {"supports_preview_metadata": true}}')
        return (await self.until(kind_is("feature_flags")))[-1]

    async def close(self) -> None:
        """Close this end and wait for the other's."""
        await self._connection.close()


@dataclass(frozen=True, kw_only=True)
class Run:
    """One prompt from its POST to its end, as its own socket saw it."""

    prompt_id: str
    client_id: str
    messages: list[Message]
    entry: dict[str, Any] = field(repr=False)

    @property
    def outputs(self) -> dict[str, Any]:
        """`outputs` of the history entry."""
        found: dict[str, Any] = self.entry["outputs"]
        return found

    @property
    def verdict(self) -> str:
        """The last message type in the history entry."""
        return str(self.entry["status"]["messages"][-1][0])

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """The data of all messages of one type, in order."""
        return [message.data for message in self.messages if message.kind == kind]


class Server:
    """The server under test, spoken to over one HTTP session."""

    def __init__(self, http: aiohttp.ClientSession, facts: Facts) -> None:
        self.http = http
        self.facts = facts

    async def request(self, method: str, path: str, **options: Any) -> Answer:
        """One request; `options` are aiohttp's."""
        async with asyncio.timeout(PATIENCE), self.http.request(method, path, **options) as response:
            return Answer(status=response.status, headers=response.headers, body=await response.read())

    async def get(self, path: str, **options: Any) -> Answer:
        """GET."""
        return await self.request("GET", path, **options)

    async def post(self, path: str, document: Any = None, **options: Any) -> Answer:
        """POST a JSON document, or whatever `options` say."""
        if document is not None:
            options["json"] = document
        return await self.request("POST", path, **options)

    @asynccontextmanager
    async def socket(self, client_id: str | None = None, *, hello: bool = True) -> AsyncIterator[Socket]:
        """An open WebSocket; with `hello` the first message, the `status`, has been read (and is kept)."""
        chosen = client_id or uuid.uuid4().hex
        async with self.http.ws_connect(
            "/ws", params={"clientId": chosen}, max_msg_size=0, autoping=False
        ) as connection:
            socket = Socket(connection, chosen)
            if hello:
                await socket.receive()
            yield socket

    async def submit(self, graph: Graph, **fields: Any) -> str:
        """POST a prompt that must be accepted whole; gives its id."""
        body = {"prompt": graph, "prompt_id": str(uuid.uuid4()), **fields}
        answer = await self.post("/prompt", body)
        assert answer.status == 200, answer.body
        assert answer.json()["node_errors"] == {}
        return str(answer.json()["prompt_id"])

    async def queue(self) -> tuple[list[str], list[str]]:
        """The ids that run, and the ids that wait, as the server lists them."""
        document = (await self.get("/queue")).json()
        return [item[1] for item in document["queue_running"]], [
            item[1] for item in document["queue_pending"]
        ]

    async def queue_item(self, prompt_id: str) -> list[Any]:
        """The queue item of a prompt that runs or waits."""
        document = (await self.get("/queue")).json()
        (item,) = [
            item for item in document["queue_running"] + document["queue_pending"] if item[1] == prompt_id
        ]
        return list(item)

    async def history(self, prompt_id: str) -> dict[str, Any] | None:
        """The history entry, if there is one."""
        answer = await self.get(f"/history/{prompt_id}")
        assert answer.status == 200
        entry: dict[str, Any] | None = answer.json().get(prompt_id)
        return entry

    async def finished(self, prompt_id: str) -> dict[str, Any]:
        """The history entry, waited for."""
        async with asyncio.timeout(PATIENCE):
            while (entry := await self.history(prompt_id)) is None:  # another process
                await asyncio.sleep(0.01)
        return entry

    async def running(self, prompt_id: str) -> None:
        """Wait until this prompt runs."""
        async with asyncio.timeout(PATIENCE):
            while prompt_id not in (await self.queue())[0]:  # another process
                await asyncio.sleep(0.01)

    async def idle(self) -> None:
        """Empty the queue, stop what runs, and wait until nothing is left."""
        async with asyncio.timeout(PATIENCE):
            while any(await self.queue()):
                await self.post("/queue", {"clear": True})
                await self.post("/interrupt", {})
                await asyncio.sleep(0.02)

    async def run(self, graph: Graph, *, previews: bool = False, **fields: Any) -> Run:
        """Run a prompt to its end on a socket of its own; `previews` makes the feature handshake first."""
        async with self.socket() as socket:
            if previews:
                await socket.announce_previews()
            prompt_id = await self.submit(graph, client_id=socket.client_id, **fields)
            messages = await socket.until(ends(prompt_id))
        entry = await self.history(prompt_id)
        assert entry is not None, "history is written before the end is announced"
        return Run(prompt_id=prompt_id, client_id=socket.client_id, messages=messages, entry=entry)

    async def run_quietly(self, graph: Graph, **fields: Any) -> tuple[str, dict[str, Any]]:
        """Run a prompt to its end without any socket; gives its id and its history entry."""
        prompt_id = await self.submit(graph, **fields)
        return prompt_id, await self.finished(prompt_id)

    async def view(self, item: Mapping[str, Any], **parameters: str) -> Answer:
        """GET /view of one file item."""
        query = {name: str(item[name]) for name in ("filename", "subfolder", "type")}
        return await self.get("/view", params={**query, **parameters})
