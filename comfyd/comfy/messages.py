"""What ComfyUI says over its WebSocket, as typed values; never keeps a connection or looks at history.

Unknown types are ignored, malformed messages are ignored and counted. An error of type `ExecutionBlocked` is
not an end and becomes `NodeBlocked`. Sources: section 5 of ComfyUI's server, as measured on 0.3.75 and
0.33.0.
"""

import struct
from collections.abc import Callable
from typing import Any, Final

import msgspec

from comfyd.comfy.redaction import without_paths
from comfyd.comfy.wire import Undecodable, decode
from comfyd.credentials import NO_SECRETS, Secrets

HANDSHAKE: Final = '{"type":"feature_flags","data":{"supports_preview_metadata":true}}'
"""The first frame of every connection: previews then name their prompt and node."""

PICTURES: Final = frozenset({"image/jpeg", "image/png", "image/webp", "image/gif", "image/avif"})


class _Message(msgspec.Struct, frozen=True, kw_only=True):
    prompt_id: str


class ExecutionStart(_Message, frozen=True, kw_only=True):
    """ComfyUI took the prompt from its queue."""


class ExecutionCached(_Message, frozen=True, kw_only=True):
    """These nodes need not run."""

    nodes: tuple[str, ...] = ()


class Executing(_Message, frozen=True, kw_only=True):
    """This node begins; None: the prompt has ended and its history is there (0 of 225 runs without)."""

    node: str | None = None


class NodeProgress(_Message, frozen=True, kw_only=True):
    """A node's own steps; both numbers are finite."""

    node: str
    value: float
    maximum: float = msgspec.field(name="max")


class NodeState(msgspec.Struct, frozen=True, array_like=True):
    """How far one node is; `state` is `running` or `finished`. Both numbers are finite."""

    value: float
    maximum: float
    state: str


class NodeStates(_Message, frozen=True, kw_only=True):
    """All nodes that have begun so far, by node id."""

    nodes: dict[str, NodeState]


class Executed(_Message, frozen=True, kw_only=True):
    """A node gave outputs: `{kind: [...]}` as in history."""

    node: str
    output: dict[str, Any] = {}


class ExecutionSuccess(_Message, frozen=True, kw_only=True):
    """The prompt has run; its history may not be there yet (Q2)."""


class ExecutionError(_Message, frozen=True, kw_only=True):
    """A node failed and the prompt with it. The message holds no path of the server."""

    node_id: str | None = None
    node_type: str | None = None
    exception_type: str = ""
    exception_message: str = ""


class NodeBlocked(_Message, frozen=True, kw_only=True):
    """A node was left out; the prompt goes on."""

    node_id: str | None = None
    message: str = ""


class ExecutionInterrupted(_Message, frozen=True, kw_only=True):
    """Somebody stopped the prompt."""

    node_id: str | None = None


class Preview(_Message, frozen=True, kw_only=True):
    """A picture made on the way, or an image of SaveImageWebsocket. `image_type` is one of `PICTURES`."""

    node_id: str | None
    image_type: str
    data: bytes


class ProgressText(_Message, frozen=True, kw_only=True):
    """A sentence that a node says while it runs."""

    node_id: str | None
    text: str


class QueueChanged(msgspec.Struct, frozen=True, kw_only=True):
    """Of the whole server: how many prompts wait or run."""

    remaining: int


Message = (
    ExecutionStart
    | ExecutionCached
    | Executing
    | NodeProgress
    | NodeStates
    | Executed
    | ExecutionSuccess
    | ExecutionError
    | NodeBlocked
    | ExecutionInterrupted
    | Preview
    | ProgressText
)
"""All that concerns one prompt."""


class _Envelope(msgspec.Struct, frozen=True):
    type: str
    data: msgspec.Raw = msgspec.Raw(b"null")


class _ExecInfo(msgspec.Struct, frozen=True):
    queue_remaining: int


class _ServerStatus(msgspec.Struct, frozen=True):
    exec_info: _ExecInfo


class _Status(msgspec.Struct, frozen=True):
    status: _ServerStatus


class _Executing(msgspec.Struct, frozen=True):
    node: str | None = None
    prompt_id: str | None = None


class _RawNodeState(msgspec.Struct, frozen=True):
    value: float | None
    """None where it was no finite number on the wire (see `wire`)."""
    max: float | None
    state: str = "running"


class _ProgressState(msgspec.Struct, frozen=True):
    prompt_id: str
    nodes: dict[str, _RawNodeState]


class _Executed(msgspec.Struct, frozen=True):
    prompt_id: str
    node: str
    output: dict[str, Any] | None = None


class _Error(msgspec.Struct, frozen=True):
    prompt_id: str
    node_id: str | None = None
    node_type: str | None = None
    exception_type: str | None = None
    exception_message: str | None = None


class _PreviewHead(msgspec.Struct, frozen=True):
    prompt_id: str
    node_id: str | None = None
    image_type: str = ""


_ENVELOPE: Final = msgspec.json.Decoder(_Envelope)
_PREVIEW_HEAD: Final = msgspec.json.Decoder(_PreviewHead)

_Reader = Callable[[bytes], Message | QueueChanged | None]


def _as_is(kind: type[Message]) -> _Reader:
    decoder: msgspec.json.Decoder[Message] = msgspec.json.Decoder(kind)
    return lambda data: decode(data, decoder)


_STATUS: Final = msgspec.json.Decoder(_Status)
_EXECUTING: Final = msgspec.json.Decoder(_Executing)
_PROGRESS_STATE: Final = msgspec.json.Decoder(_ProgressState)
_EXECUTED: Final = msgspec.json.Decoder(_Executed)
_ERROR: Final = msgspec.json.Decoder(_Error)


def _status(data: bytes) -> QueueChanged:
    return QueueChanged(remaining=decode(data, _STATUS).status.exec_info.queue_remaining)


def _executing(data: bytes) -> Executing | None:
    """What a new connection is told at first has no prompt id: it says nothing."""
    raw = decode(data, _EXECUTING)
    return None if raw.prompt_id is None else Executing(prompt_id=raw.prompt_id, node=raw.node)


def _progress_state(data: bytes) -> NodeStates:
    raw = decode(data, _PROGRESS_STATE)
    return NodeStates(
        prompt_id=raw.prompt_id,
        nodes={
            node: NodeState(state.value, state.max, state.state)
            for node, state in raw.nodes.items()
            if state.value is not None and state.max is not None
        },
    )


def _executed(data: bytes) -> Executed:
    raw = decode(data, _EXECUTED)
    return Executed(prompt_id=raw.prompt_id, node=raw.node, output=raw.output or {})


def _error(data: bytes) -> ExecutionError | NodeBlocked:
    raw = decode(data, _ERROR)
    message = (raw.exception_message or "").strip()
    if raw.exception_type == "ExecutionBlocked":
        return NodeBlocked(prompt_id=raw.prompt_id, node_id=raw.node_id, message=message)
    return ExecutionError(
        prompt_id=raw.prompt_id,
        node_id=raw.node_id,
        node_type=raw.node_type,
        exception_type=raw.exception_type or "",
        exception_message=message,
    )


_READERS: Final[dict[str, _Reader]] = {
    "status": _status,
    "execution_start": _as_is(ExecutionStart),
    "execution_cached": _as_is(ExecutionCached),
    "executing": _executing,
    "progress": _as_is(NodeProgress),
    "progress_state": _progress_state,
    "executed": _executed,
    "execution_success": _as_is(ExecutionSuccess),
    "execution_error": _error,
    "execution_interrupted": _as_is(ExecutionInterrupted),
}

_WORD: Final = struct.Struct(">I")
_OLD_FORMATS: Final = {1: "image/jpeg", 2: "image/png"}


class MessageReader:
    """Turns the frames of one connection into messages. Lives as long as the connection.

    Remembers which node the latest messages spoke of: a binary frame of the old style names no prompt, and
    ComfyUI runs one prompt at a time. `secrets_of` says what must not be shown of what is said of a prompt.
    """

    def __init__(self, secrets_of: Callable[[str], Secrets] = lambda _: NO_SECRETS) -> None:
        self.malformed = 0
        self._secrets_of = secrets_of
        self._running: tuple[str, str | None] | None = None

    def text(self, frame: str) -> Message | QueueChanged | None:
        """A text frame; None for one that says nothing to us."""
        try:
            envelope = decode(frame, _ENVELOPE)
            reader = _READERS.get(envelope.type)
            message = None if reader is None else reader(bytes(envelope.data))
        except Undecodable:
            self.malformed += 1
            return None
        self._notice(message)
        match message:
            case ExecutionError(prompt_id=prompt_id, exception_message=said):
                return msgspec.structs.replace(message, exception_message=self._fit(prompt_id, said))
            case NodeBlocked(prompt_id=prompt_id, message=said):
                return msgspec.structs.replace(message, message=self._fit(prompt_id, said))
            case _:
                return message

    def binary(self, frame: bytes) -> Preview | ProgressText | None:
        """A binary frame; None for one that names no prompt while none is known to run."""
        try:
            (kind,) = _WORD.unpack_from(frame)
            match kind:
                case 1:
                    return self._old_preview(frame)
                case 3:
                    return self._progress_text(frame)
                case 4:
                    return _preview(frame)
                case _:
                    return None
        except (struct.error, Undecodable, UnicodeDecodeError):
            self.malformed += 1
            return None

    def _notice(self, message: Message | QueueChanged | None) -> None:
        match message:
            case Executing(node=None):
                self._running = None
            case Executing(node=node) | NodeProgress(node=node):
                self._running = (message.prompt_id, node)
            case ExecutionStart():
                self._running = (message.prompt_id, None)
            case NodeStates() if self._running is None or self._running[0] != message.prompt_id:
                self._running = (message.prompt_id, None)
            case _:
                pass

    def _old_preview(self, frame: bytes) -> Preview | None:
        _kind, image_format = struct.unpack_from(">II", frame)
        if image_format not in _OLD_FORMATS:
            raise Undecodable("an unknown image format")
        if self._running is None:
            return None
        prompt_id, node = self._running
        return Preview(
            prompt_id=prompt_id, node_id=node, image_type=_OLD_FORMATS[image_format], data=frame[8:]
        )

    def _progress_text(self, frame: bytes) -> ProgressText | None:
        node, text = _split(frame)
        if self._running is None:
            return None
        prompt_id, said = self._running[0], text.decode()
        return ProgressText(
            prompt_id=prompt_id, node_id=node.decode() or None, text=self._fit(prompt_id, said)
        )

    def _fit(self, prompt_id: str, text: str) -> str:
        """A text about this prompt as it may be shown."""
        return without_paths(text, self._secrets_of(prompt_id))


def _preview(frame: bytes) -> Preview:
    head, picture = _split(frame)
    facts = decode(head, _PREVIEW_HEAD)
    if facts.image_type not in PICTURES:
        raise Undecodable("not a picture")
    return Preview(
        prompt_id=facts.prompt_id, node_id=facts.node_id, image_type=facts.image_type, data=picture
    )


def _split(frame: bytes) -> tuple[bytes, bytes]:
    """The two parts of `[u32 kind][u32 length][length bytes][the rest]`."""
    _kind, length = struct.unpack_from(">II", frame)
    if length > len(frame) - 8:
        raise Undecodable("shorter than it says")
    return frame[8 : 8 + length], frame[8 + length :]
