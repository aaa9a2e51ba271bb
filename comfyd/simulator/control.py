"""The simulator's own routes, which no ComfyUI has: the execution log, the switches and some accidents.

Under `/simulator/` only, never under `/api`; they go on working whatever the switches do to HTTP.

GET  /simulator/executions          -> {"executions": [...]}, oldest first
GET  /simulator/faults              -> all switches
POST /simulator/faults {name: value} -> all switches; an unknown name or wrong type is 400
POST /simulator/accidents {"accident": "crash" | "drop_sockets" | "refuse", "seconds"?: number}
     crash: the server dies like after kill -9 (`comfyd simulate` exits);
     drop_sockets: every WebSocket breaks;
     refuse: no connection is accepted for `seconds` (default 1)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aiohttp import web

from comfyd.simulator.jobs import answer

if TYPE_CHECKING:
    from collections.abc import Callable

    from comfyd.simulator.executions import ExecutionLog
    from comfyd.simulator.faults import Faults

PREFIX = "/simulator/"


@dataclass(frozen=True, slots=True, kw_only=True)
class Actions:
    """What can happen to a whole server."""

    crash: Callable[[], None]
    drop_sockets: Callable[[], int]
    refuse: Callable[[float], None]


def routes(faults: Faults, log: ExecutionLog, actions: Actions) -> list[web.RouteDef]:
    """The route table of this part."""

    async def executions(_request: web.Request) -> web.Response:
        return answer({"executions": log.document()})

    async def get_faults(_request: web.Request) -> web.Response:
        return answer(faults.document())

    async def post_faults(request: web.Request) -> web.Response:
        try:
            faults.change(_object(await request.json()))
        except ValueError as error:
            return answer({"error": str(error)}, 400)
        return answer(faults.document())

    async def post_accidents(request: web.Request) -> web.Response:
        try:
            document = _object(await request.json())
            seconds = float(document.get("seconds", 1.0))
        except (ValueError, TypeError) as error:
            return answer({"error": str(error)}, 400)
        accident = document.get("accident")
        if accident == "crash":
            actions.crash()
        elif accident == "drop_sockets":
            actions.drop_sockets()
        elif accident == "refuse":
            actions.refuse(seconds)
        else:
            return answer({"error": f"no such accident: {accident}"}, 400)
        return answer({})

    return [
        web.get(PREFIX + "executions", executions),
        web.get(PREFIX + "faults", get_faults),
        web.post(PREFIX + "faults", post_faults),
        web.post(PREFIX + "accidents", post_accidents),
    ]


def _object(document: Any) -> dict[str, Any]:
    if not isinstance(document, dict):
        raise ValueError("the body must be a JSON object")  # noqa: TRY004  # bad JSON is a ValueError too
    return document
