"""The workflow templates of one directory, re-read when its files change; never writes there."""

import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from comfyd.config import LimitsConfig
from comfyd.errors import TemplateError, UnknownWorkflow
from comfyd.graphs import GraphLimits
from comfyd.workflows import WorkflowTemplate, parse_template

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_GRAPH, _TABLE = ".json", ".toml"

# Editors write in place (size and times move) or rename a new file over the old one (the inode moves).
_Signature = tuple[int, int, int, int]
_UNREAD: _Signature = (-1, -1, -1, -1)


@dataclass(frozen=True, kw_only=True)
class TemplateProblem:
    """A template that cannot be read. `message` is whole: it begins with the file and, where known, the
    line."""

    name: str
    file: str
    line: int | None
    message: str


@dataclass(frozen=True, kw_only=True)
class TemplateChange:
    """What one refresh found. `message` says what is wrong with a `broken` one and is empty otherwise.

    `mended` is a template whose files are again what its last good version was read from.
    """

    name: str
    kind: Literal["added", "changed", "removed", "broken", "mended"]
    message: str = ""


@dataclass(frozen=True, kw_only=True)
class _State:
    """All that was read, replaced as a whole, so that readers in another thread see one moment."""

    templates: Mapping[str, WorkflowTemplate] = field(default_factory=dict)
    problems: Mapping[str, TemplateProblem] = field(default_factory=dict)
    signatures: Mapping[str, _Signature] = field(default_factory=dict)


def graph_limits(limits: LimitsConfig) -> GraphLimits:
    """How big graphs may be, templates' and clients' alike."""
    return GraphLimits(
        nodes=limits.nodes,
        depth=limits.depth,
        string_length=limits.string_length,
        size_bytes=limits.body_bytes,
    )


class Catalog:
    """The templates of one directory; lives as long as the process.

    `refresh` blocks on the disk (call it in a thread, one call at a time); the other methods only look at
    what it left. A broken file leaves the last good version of its template in place; a deleted `.json`
    takes it away.
    """

    def __init__(self, directory: Path, limits: GraphLimits | None = None) -> None:
        self._directory = directory
        self._limits = limits or GraphLimits()
        self._state = _State()

    def get(self, name: str) -> WorkflowTemplate:
        """Return the template. Raises `UnknownWorkflow` that names the nearest one, or why this one is
        broken."""
        state = self._state
        found = state.templates.get(name)
        if found is not None:
            return found
        problem = state.problems.get(name)
        if problem is not None:
            raise UnknownWorkflow(f"The workflow template {name} cannot be used: {problem.message}")
        near = difflib.get_close_matches(name[:100], [*state.templates], n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UnknownWorkflow(f"There is no workflow template {name[:100]!r}{hint}")

    def list(self) -> tuple[WorkflowTemplate, ...]:
        """Return every template, by name."""
        return tuple(self._state.templates.values())

    def problems(self) -> tuple[TemplateProblem, ...]:
        """Return what is wrong at the moment, by name."""
        return tuple(self._state.problems.values())

    def refresh(self) -> tuple[TemplateChange, ...]:
        """Read what changed since the last call and return it. Costs one directory listing when nothing
        did."""
        old = self._state
        try:
            signatures = self._scan()
        except OSError as error:
            # It may be gone for a moment (a remount): what was read stays good.
            message = (
                f"{self._directory.name}: {error.strerror}: name a directory of templates in workflows.dir"
            )
            problem = TemplateProblem(name="", file=self._directory.name, line=None, message=message)
            new = _State(templates=old.templates, problems={"": problem})
        else:
            if signatures == old.signatures and "" not in old.problems:
                return ()
            new = self._read(signatures, old)
        self._state = new
        return _changes(old, new)

    def _scan(self) -> dict[str, _Signature]:
        signatures = {}
        with os.scandir(self._directory) as entries:
            for entry in entries:
                if entry.name.startswith(".") or not entry.name.endswith((_GRAPH, _TABLE)):
                    continue
                try:
                    if entry.is_file():
                        stat = entry.stat()
                        signatures[entry.name] = (
                            stat.st_mtime_ns,
                            stat.st_ctime_ns,
                            stat.st_size,
                            stat.st_ino,
                        )
                except OSError:
                    signatures[entry.name] = _UNREAD
        return signatures

    def _read(self, signatures: dict[str, _Signature], old: _State) -> _State:
        templates: dict[str, WorkflowTemplate] = {}
        problems: dict[str, TemplateProblem] = {}
        for name in sorted({file[: -len(_GRAPH)] for file in signatures}):
            files = (name + _GRAPH, name + _TABLE)
            if name in old.templates and files[0] in signatures:
                templates[name] = old.templates[name]
            if all(signatures.get(file) == old.signatures.get(file) for file in files):
                if name in old.problems:
                    problems[name] = old.problems[name]
                continue
            try:
                templates[name] = self._load(name, signatures)
            except TemplateError as error:
                problems[name] = TemplateProblem(
                    name=name,
                    file=error.details["file"],
                    line=error.details.get("line"),
                    message=error.message,
                )
                if "unread" in error.details:
                    # Nothing was read, so nothing may pass for unchanged: the next refresh tries again.
                    signatures |= {file: _UNREAD for file in files if file in signatures}
        return _State(templates=templates, problems=problems, signatures=signatures)

    def _load(self, name: str, signatures: Mapping[str, _Signature]) -> WorkflowTemplate:
        graph, table = name + _GRAPH, name + _TABLE
        if graph not in signatures:
            message = f"there is no {graph} beside it: the graph, exported from ComfyUI with Export (API)"
            raise self._error(table, message)
        if not _NAME.fullmatch(name):
            rule = (
                "a template's name begins with a letter or digit and has up to 100 letters, digits, . _ and -"
            )
            raise self._error(graph, f"rename it: {rule}")
        return parse_template(
            name,
            self._bytes(graph, signatures),
            self._bytes(table, signatures) if table in signatures else None,
            json_file=self._shown(graph),
            toml_file=self._shown(table),
            limits=self._limits,
        )

    def _bytes(self, file: str, signatures: Mapping[str, _Signature]) -> bytes:
        if signatures[file][2] > self._limits.size_bytes:
            raise self._error(file, f"is larger than {self._limits.size_bytes} bytes")
        try:
            return (self._directory / file).read_bytes()
        except OSError as error:
            raise self._error(file, f"cannot be read: {error.strerror}", unread=True) from error

    def _shown(self, file: str) -> str:
        """The file as messages name it: never with the whole path of this machine."""
        return f"{self._directory.name}/{file}"

    def _error(self, file: str, message: str, **facts: bool) -> TemplateError:
        shown = self._shown(file)
        return TemplateError(f"{shown}: {message}", details={"file": shown, **facts})


def _changes(old: _State, new: _State) -> tuple[TemplateChange, ...]:
    changes = []
    for name in sorted({*old.templates, *new.templates, *old.problems, *new.problems}):
        before, after = old.templates.get(name), new.templates.get(name)
        problem = new.problems.get(name)
        if problem is not None and problem != old.problems.get(name):
            changes.append(TemplateChange(name=name, kind="broken", message=problem.message))
        if before is None and after is not None:
            changes.append(TemplateChange(name=name, kind="added"))
        elif before is not None and after is None:
            changes.append(TemplateChange(name=name, kind="removed"))
        elif before is not None and after is not None and before.version != after.version:
            changes.append(TemplateChange(name=name, kind="changed"))
        elif problem is None and name in old.problems:
            changes.append(TemplateChange(name=name, kind="mended"))
    return tuple(changes)
