"""The routes about prompts: POST /prompt, the queue, interrupts and the history.

Malformed bodies raise where ComfyUI's handler does; the server answers those with its 500 text/plain.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import orjson
from aiohttp import web

from comfyd.simulator import timing
from comfyd.simulator.jobs import is_canonical
from comfyd.simulator.prompt_queue import PromptQueue, QueueItem
from comfyd.simulator.sockets import encode
from comfyd.simulator.validation import check_prompt

if TYPE_CHECKING:
    from comfyd.simulator.catalog import Catalog
    from comfyd.simulator.engine import Engine
    from comfyd.simulator.faults import Faults
    from comfyd.simulator.folders import Folders
    from comfyd.simulator.options import Flavor

SECRETS = ("auth_token_comfy_org", "api_key_comfy_org")
LONG_NUMBER = re.compile(rb"\d{19}")  # the fast parser turns integers beyond 64 bit into floats


class Prompts:
    """The handlers of one server process, and its prompt counter."""

    def __init__(
        self, catalog: Catalog, folders: Folders, flavor: Flavor, faults: Faults, queue: PromptQueue
    ) -> None:
        self.number = 0
        self._catalog = catalog
        self._folders = folders
        self._flavor = flavor
        self._faults = faults
        self._queue = queue

    def routes(self, engine: Engine) -> list[web.RouteDef]:
        """The route table of this part."""

        async def interrupt(request: web.Request) -> web.Response:
            try:
                document = parse(await request.read())
            except ValueError:
                document = {}
            prompt_id = document.get("prompt_id")
            if not prompt_id or any(item.prompt_id == prompt_id for item in self._queue.running):
                engine.interrupt()  # without an id: whatever runs (Q8)
            return web.Response()

        return [
            web.post("/prompt", self.post),
            web.get("/prompt", self.remaining),
            web.get("/queue", self.queue),
            web.post("/queue", self.change_queue),
            web.post("/interrupt", interrupt),
            web.get("/history", self.history),
            web.get("/history/{prompt_id}", self.history_entry),
            web.post("/history", self.change_history),
            web.post("/free", self.free),
        ]

    async def post(self, request: web.Request) -> web.StreamResponse:
        """POST /prompt."""
        body = await request.read()
        if self._faults.prompt_stall_seconds > 0:
            await timing.pause(self._faults.prompt_stall_seconds)
        response = self._submit(request, parse(body))
        if self._faults.prompt_answer_seconds > 0:
            await timing.pause(self._faults.prompt_answer_seconds)
        if self._faults.use("prompt_answers_lost"):
            while request.transport is not None:  # until the client gives up
                await timing.pause(0.02)
        if self._faults.use("prompt_answers_cut") and request.transport is not None:
            request.transport.abort()
        return response

    def _submit(self, request: web.Request, document: Any) -> web.Response:
        number = self._number(document)
        if "prompt" not in document:
            message = "No prompt provided"
            error = {"type": "no_prompt", "message": message, "details": message, "extra_info": {}}
            return refusal(error, {})
        prompt = document["prompt"]
        prompt_id = self._prompt_id(document)
        if prompt_id is None:
            message = "prompt_id must be a valid UUID"
            error = {"type": "invalid_prompt_id", "message": message, "details": message, "extra_info": {}}
            return refusal(error, {})
        targets = document.get("partial_execution_targets")
        verdict = check_prompt(prompt, targets, self._catalog, self._folders, self._flavor)
        extra_data = document.get("extra_data", {})
        if "client_id" in document:
            extra_data["client_id"] = document["client_id"]
        sensitive = {name: extra_data.pop(name) for name in SECRETS if name in extra_data}
        if verdict.error is not None:
            if self._faults.secrets_repeated:
                _repeat(sensitive, verdict.error, verdict.node_errors)
            return refusal(verdict.error, verdict.node_errors)
        if self._flavor.jobs_api and "Comfy-Usage-Source" in request.headers:
            extra_data["comfy_usage_source"] = request.headers["Comfy-Usage-Source"]
        extra_data["create_time"] = timing.milliseconds()
        self._queue.put(QueueItem(number, prompt_id, prompt, extra_data, verdict.outputs, sensitive))
        return self._answer({"prompt_id": prompt_id, "number": number, "node_errors": verdict.node_errors})

    def _number(self, document: Any) -> float:
        """The priority: explicit, or the counter, negative for `front`."""
        if "number" in document:
            return float(document["number"])
        number = -self.number if _field(document, "front", otherwise=False) else self.number
        self.number += 1
        return number

    def _prompt_id(self, document: dict[str, Any]) -> str | None:
        """The id to use; None if this flavor refuses it."""
        if not self._flavor.canonical_prompt_ids:
            return str(document["prompt_id"]) if "prompt_id" in document else timing.new_id()
        prompt_id = document.get("prompt_id")
        if prompt_id is None:
            return timing.new_id()
        return prompt_id if is_canonical(prompt_id) else None

    async def remaining(self, _request: web.Request) -> web.Response:
        """GET /prompt."""
        return self._answer({"exec_info": {"queue_remaining": self._queue.remaining()}})

    async def queue(self, _request: web.Request) -> web.Response:
        """GET /queue: pending prompts in heap order."""
        return self._answer(
            {
                "queue_running": [item.public() for item in self._queue.running],
                "queue_pending": [item.public() for item in self._queue.pending],
            }
        )

    async def change_queue(self, request: web.Request) -> web.Response:
        """POST /queue: clear it, delete from it."""
        document = parse(await request.read())
        if _field(document, "clear", otherwise=False):
            self._queue.clear()
        for prompt_id in _field(document, "delete", otherwise=()):
            self._queue.delete(prompt_id)
        return web.Response()

    async def history(self, request: web.Request) -> web.Response:
        """GET /history."""
        max_items = int(request.query["max_items"]) if "max_items" in request.query else None
        offset = int(request.query.get("offset", -1))
        return self._answer(self._queue.page(max_items, offset))

    async def history_entry(self, request: web.Request) -> web.Response:
        """GET /history/{prompt_id}: {} for an unknown one."""
        prompt_id = request.match_info["prompt_id"]
        entry = self._queue.history.get(prompt_id)
        return self._answer({} if entry is None else {prompt_id: entry})

    async def change_history(self, request: web.Request) -> web.Response:
        """POST /history: clear it, delete from it."""
        document = parse(await request.read())
        if _field(document, "clear", otherwise=False):
            self._queue.history.clear()
        for prompt_id in _field(document, "delete", otherwise=()):
            self._queue.history.pop(prompt_id, None)
        return web.Response()

    async def free(self, request: web.Request) -> web.Response:
        """POST /free: handled by the worker when it is idle."""
        document = parse(await request.read())
        for name in ("unload_models", "free_memory"):
            if document.get(name, False):
                self._queue.set_flag(name, value=True)
        return web.Response()

    def _answer(self, document: Any) -> web.Response:
        # After a number that is not finite ComfyUI's answers are not JSON any more (Q16): neither are these.
        body = json.dumps(document).encode() if self._queue.has_odd_numbers else encode(document)
        return web.Response(body=body, content_type="application/json", charset="utf-8")


def _repeat(secrets: dict[str, Any], error: dict[str, Any], node_errors: dict[str, Any]) -> None:
    """Let the refusal show them in every text and value."""
    errors = [error, *(each for entry in node_errors.values() for each in entry["errors"])]
    for each in errors:
        each["message"] = f"{each['message']} ({secrets})"
        each["details"] = f"{each['details']} {list(secrets.values())}"
        each["extra_info"] = {**each["extra_info"], "received_value": secrets}


def _field(document: Any, name: str, otherwise: Any) -> Any:
    """A field of a body that may be a list, which has none: ComfyUI only asks `in`."""
    if name not in document:
        return otherwise
    return document[name]


def parse(body: bytes) -> Any:
    """A JSON body as Python's own parser sees it (NaN, huge integers), with the fast one where they agree."""
    if LONG_NUMBER.search(body) is None:
        try:
            return orjson.loads(body)
        except orjson.JSONDecodeError:
            pass  # Python's parser takes more
    return json.loads(body)


def refusal(error: dict[str, Any], node_errors: dict[str, Any]) -> web.Response:
    """A 400 in the shape of POST /prompt."""
    body = encode({"error": error, "node_errors": node_errors})
    return web.Response(body=body, status=400, content_type="application/json", charset="utf-8")
