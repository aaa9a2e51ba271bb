"""Server-Sent Events from bytes; never reads a socket."""

from collections.abc import Iterator
from typing import Any, Final

import msgspec

EVENT_BYTES: Final = 32 * 1024 * 1024
"""The longest event that is taken in; a preview is far below it."""


class ServerEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One event: `name` is `status progress preview output log`, `data` the object that it carries."""

    name: str
    data: dict[str, Any]


class EventParser:
    """Cuts a stream of chunks into events. Lives as long as one stream."""

    def __init__(self) -> None:
        self._held = bytearray()
        self._name = ""
        self._data: list[bytes] = []

    def feed(self, chunk: bytes) -> Iterator[ServerEvent]:
        """The events that this chunk completes. Raises `ValueError` for what is not our server's stream."""
        *lines, rest = chunk.split(b"\n")
        if lines:
            lines[0] = bytes(self._held) + lines[0]
            self._held.clear()
        self._held += rest
        if len(self._held) > EVENT_BYTES:
            raise ValueError("an event is too long")
        for line in lines:
            event = self._line(line.rstrip(b"\r"))
            if event is not None:
                yield event

    def _line(self, line: bytes) -> ServerEvent | None:
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if field == b"event":
            self._name = value.decode()
        elif field == b"data":
            self._data.append(value)
        if line or not self._data:
            # Comments (heartbeats), `id` and `retry` say nothing that a command needs.
            return None
        name, data = self._name or "message", b"\n".join(self._data)
        self._name, self._data = "", []
        return ServerEvent(name=name, data=msgspec.json.decode(data, type=dict[str, Any]))
