"""Where ComfyUI says that a prompt is, and how it ended; never asks it, never decides what follows."""

from typing import Any, Final, Literal

import msgspec

from comfyd.comfy.redaction import without_paths
from comfyd.comfy.wire import decode
from comfyd.credentials import NO_SECRETS, Secrets

Verdict = Literal["success", "error", "interrupted"]


class NodeFailure(msgspec.Struct, frozen=True, kw_only=True):
    """What a node said when it failed. No text holds a path of the server."""

    node_id: str | None = None
    node_class: str | None = None
    exception_type: str | None = None
    message: str = ""


class HistoryEntry(msgspec.Struct, frozen=True, kw_only=True):
    """How a prompt ended. `outputs` is `{node_id: {kind: [...]}}`; times are by ComfyUI's own clock."""

    verdict: Verdict
    outputs: dict[str, Any] = {}
    error: NodeFailure | None = None
    """Set when and only when the verdict is `error`."""
    started_at: int | None = None
    ended_at: int | None = None
    targets: tuple[str, ...] | None = None
    """The output nodes that ComfyUI set out to run: not all of them if some were invalid (Q11)."""

    @property
    def execution_ms(self) -> int | None:
        """How long ComfyUI executed; None where it did not say."""
        if self.started_at is None or self.ended_at is None:
            return None
        return max(self.ended_at - self.started_at, 0)


class Pending(msgspec.Struct, frozen=True, kw_only=True):
    """It waits in ComfyUI's queue; `position` 1 is the next to run."""

    position: int


class Running(msgspec.Struct, frozen=True, kw_only=True):
    """ComfyUI works on it."""


class Ended(msgspec.Struct, frozen=True, kw_only=True):
    """It has ended."""

    entry: HistoryEntry


class Absent(msgspec.Struct, frozen=True, kw_only=True):
    """In neither: never accepted, deleted while pending, gone from history, or ComfyUI was restarted."""


Sighting = Pending | Running | Ended | Absent


class QueueView(msgspec.Struct, frozen=True, kw_only=True):
    """The prompt ids in ComfyUI's queue; `pending` in the order in which they will run."""

    running: tuple[str, ...] = ()
    pending: tuple[str, ...] = ()


class _Item(msgspec.Struct, frozen=True, array_like=True):
    number: Any
    prompt_id: str


class _Queue(msgspec.Struct, frozen=True):
    queue_running: list[_Item]
    queue_pending: list[_Item]


class _RawStatus(msgspec.Struct, frozen=True):
    status_str: str | None = None
    messages: list[tuple[str, Any]] = []


class _Prompt(msgspec.Struct, frozen=True, array_like=True):
    """An item of the queue, kept in history. Its graph and extra data are left undecoded."""

    number: msgspec.Raw
    prompt_id: msgspec.Raw
    graph: msgspec.Raw
    extra_data: msgspec.Raw
    targets: tuple[str, ...]


class _RawEntry(msgspec.Struct, frozen=True):
    prompt: msgspec.Raw = msgspec.Raw(b"null")
    outputs: dict[str, Any] | None = None
    status: _RawStatus | None = None


_QUEUE: Final = msgspec.json.Decoder(_Queue)
_PROMPT: Final = msgspec.json.Decoder(_Prompt)
_HISTORY: Final = msgspec.json.Decoder(dict[str, _RawEntry])
_VERDICTS: Final[dict[str, Verdict]] = {
    "execution_success": "success",
    "execution_error": "error",
    "execution_interrupted": "interrupted",
}


def read_queue(body: bytes) -> QueueView:
    """The answer of `GET /queue`; its own order is that of a heap. Raises `Undecodable`."""
    queue = decode(body, _QUEUE)
    pending = sorted(queue.queue_pending, key=_turn)
    return QueueView(
        running=tuple(item.prompt_id for item in queue.queue_running),
        pending=tuple(item.prompt_id for item in pending),
    )


def _turn(item: _Item) -> tuple[float, str]:
    number = item.number
    known = isinstance(number, int | float) and not isinstance(number, bool)
    return (number if known else float("inf"), item.prompt_id)


def read_history(body: bytes, prompt_id: str, secrets: Secrets = NO_SECRETS) -> HistoryEntry | None:
    """The answer of `GET /history/{id}`; None where it holds no such entry. Raises `Undecodable`."""
    entry = decode(body, _HISTORY).get(prompt_id)
    if entry is None:
        return None
    status = entry.status or _RawStatus()
    started_at = ended_at = None
    verdict: Verdict | None = None
    last: dict[str, Any] = {}
    for name, data in status.messages:
        facts = data if isinstance(data, dict) else {}
        if name == "execution_start":
            started_at = _time(facts)
        elif name in _VERDICTS and facts.get("exception_type") != "ExecutionBlocked":
            # the last one counts, whatever `status_str` says (Q14)
            verdict, last, ended_at = _VERDICTS[name], facts, _time(facts)
    if verdict is None:
        verdict = "success" if status.status_str == "success" else "error"
    return HistoryEntry(
        verdict=verdict,
        outputs=entry.outputs or {},
        error=_failure(last, secrets) if verdict == "error" else None,
        started_at=started_at,
        ended_at=ended_at,
        targets=_targets(entry.prompt),
    )


def _targets(prompt: msgspec.Raw) -> tuple[str, ...] | None:
    """None where the entry is of another shape: what it says of the outputs is then all there is."""
    try:
        return _PROMPT.decode(prompt).targets
    except msgspec.DecodeError:
        return None


def _time(facts: dict[str, Any]) -> int | None:
    value = facts.get("timestamp")
    return int(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _failure(facts: dict[str, Any], secrets: Secrets) -> NodeFailure:
    message = _text(facts, "exception_message")
    return NodeFailure(
        node_id=_text(facts, "node_id"),
        node_class=_text(facts, "node_type"),
        exception_type=_text(facts, "exception_type"),
        message="ComfyUI did not say why." if not message else without_paths(message.strip(), secrets),
    )


def _text(facts: dict[str, Any], name: str) -> str | None:
    value = facts.get(name)
    return value if isinstance(value, str) else None
