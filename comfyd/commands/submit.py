"""`comfyd submit`: sends a workflow and its files to a running comfyd, waits, saves the results.

Never runs one itself.
"""

import asyncio
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import msgspec

from comfyd.clock import SystemClock
from comfyd.commands.bar import ProgressBar, printable
from comfyd.commands.exits import CannotCreate, Exit, ServerRefused, UnreadableFile, exit_for
from comfyd.commands.rest import Json, RestClient, connect, server_url
from comfyd.commands.uploads import Attachment, outgoing
from comfyd.config import Config


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """What the command line asks for."""

    workflow: str
    inputs: tuple[tuple[str, Any], ...] = ()
    """As `parse_input` makes them."""
    output: Json = {}
    """What is wanted of the outputs, in the words of the API."""
    priority: int | str | None = None
    wait: bool = False
    directory: Path = Path()
    as_json: bool = False


def run(config: Config, order: Order, out: TextIO, err: TextIO) -> int:
    """Submit; with `order.wait` stay until the end and save the outputs.

    Ends with 0 or, if the task did not complete, 1. Raises `UnreadableFile`, `ServerUnreachable` and the
    errors of `downloads.save`.
    """
    body = request_body(order)
    _check_files(body.get("inputs", {}))
    if order.wait:
        _make(order.directory)
    return asyncio.run(_submit(server_url(config), body, order, out, err))


def parse_input(text: str) -> tuple[str, Any]:
    """`name=value`: the value is JSON where it is JSON, and a text otherwise. Raises `ValueError`.

    `@path` is an `Attachment`, and `@@` begins a text that begins with `@`.
    """
    name, mark, value = text.partition("=")
    if not name or not mark:
        raise ValueError(f"{text!r} is not name=value")
    if value.startswith("@@"):
        return name, value[1:]
    if value.startswith("@"):
        if value == "@":
            raise ValueError(f"{text!r} names no file")
        return name, Attachment(path=Path(value[1:]))
    try:
        return name, json.loads(value, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return name, value


def _no_constant(word: str) -> None:
    raise ValueError(f"{word} is not JSON")


def _make(directory: Path) -> None:
    """Before anything runs: where its outputs could not be saved it need not."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CannotCreate(f"{directory} cannot be made: {error.strerror}") from error
    if not os.access(directory, os.W_OK | os.X_OK):
        raise CannotCreate(f"{directory} cannot be written")


def request_body(order: Order) -> Json:
    """The API's request, with files not uploaded yet.

    Raises `UnreadableFile` where `order.workflow` names a file that is no graph.
    """
    body: Json = {"workflow": order.workflow}
    if order.workflow.endswith(".json") or "/" in order.workflow:
        body["workflow"] = _graph(Path(order.workflow))
    if order.inputs:
        body["inputs"] = dict(order.inputs)
    if order.priority is not None:
        body["priority"] = order.priority
    if order.output:
        body["output"] = dict(order.output)
    return body


def _check_files(inputs: Mapping[str, Any]) -> None:
    """Raise `UnreadableFile` before anything is sent."""
    for name, value in inputs.items():
        if isinstance(value, Attachment):
            try:
                with outgoing(value.path):
                    pass
            except UnreadableFile as error:
                hint = f"-i {name}=@FILE uploads a file, {name}=@@ begins a text with @"
                raise UnreadableFile(f"{error.message} ({hint})") from error


def _graph(path: Path) -> Json:
    try:
        # The standard library's: it keeps whole numbers of any size, as seeds are.
        graph = json.loads(path.read_bytes())
    except OSError as error:
        raise UnreadableFile(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UnreadableFile(f"{path} is not JSON: {error}") from error
    if not isinstance(graph, dict):
        raise UnreadableFile(f"{path} is not a workflow: export it from ComfyUI with Export (API)")
    return graph


async def _submit(url: str, body: Json, order: Order, out: TextIO, err: TextIO) -> int:
    async with connect(url, SystemClock()) as client:
        try:
            task = await client.submit(await _uploaded(client, body))
        except ServerRefused as error:
            for line in refusal_lines(error) or [error.message]:
                print(printable(line), file=err)
            return exit_for(error)
        if not order.as_json:
            print(task["task_id"], file=out, flush=True)
        elif not order.wait:
            print(json.dumps(task), file=out, flush=True)
        return await _wait(client, task["task_id"], order, out, err) if order.wait else Exit.OK


async def _uploaded(client: RestClient, body: Json) -> Json:
    """The request with a reference in place of each file; a file is uploaded once, whatever it is called."""
    references: dict[tuple[int, int], str] = {}
    inputs: Json = {}
    for name, value in body.get("inputs", {}).items():
        inputs[name] = value
        if isinstance(value, Attachment):
            with outgoing(value.path) as file:
                identity = file.identity
            if identity not in references:
                references[identity] = await client.upload(value.path)
            inputs[name] = references[identity]
    return {**body, "inputs": inputs} if inputs else body


async def _wait(client: RestClient, task_id: str, order: Order, out: TextIO, err: TextIO) -> int:
    bar = ProgressBar(err)
    try:
        task = await client.watch(task_id, bar.show)
    except asyncio.CancelledError:
        bar.close()
        print(f"task {task_id} goes on without us", file=err)
        raise
    finally:
        bar.close()
    saved = []
    for output in task["outputs"] or ():
        path = await client.download(task_id, output, order.directory)
        saved.append(str(path))
        if not order.as_json:
            print(path, file=out, flush=True)
    if order.as_json:
        print(json.dumps({**task, "saved": saved}), file=out, flush=True)
    if task["status"] == "COMPLETED":
        return Exit.OK
    for line in failure_lines(task):
        print(printable(line), file=err)
    return Exit.FAILED


def refusal_lines(error: ServerRefused) -> Sequence[str]:
    """What is wrong with each input and each node, one line each; the message itself is not repeated."""
    details = error.details["details"]
    lines = [f"input {name}: {message}" for name, message in _messages(details.get("inputs"))]
    for node, found in (details.get("node_errors") or {}).items():
        title = found.get("title") or found.get("class_type") or ""
        shown = f"node {node} ({title})" if title else f"node {node}"
        for problem in found.get("errors") or ():
            text = problem.get("message", "") if isinstance(problem, dict) else str(problem)
            detail = problem.get("details") if isinstance(problem, dict) else None
            lines.append(f"{shown}: {text}" + (f": {detail}" if detail else ""))
    return lines


def _messages(inputs: Any) -> list[tuple[str, str]]:
    return [
        (name, str(message))
        for name, messages in (inputs or {}).items()
        for message in (messages if isinstance(messages, list) else [messages])
    ]


def failure_lines(task: Json) -> Sequence[str]:
    """Why a task ended without being completed; the message names the node where there is one."""
    error = task.get("error")
    if not error:
        return [f"task {task['task_id']}: {task['status']}"]
    return [f"{task['status']} {error['code']}: {error['message']}"]
