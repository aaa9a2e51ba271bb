"""Nodes on strings, numbers and previews of any value."""

from __future__ import annotations

import json
import re
from typing import Any

from comfyd.simulator.nodes.base import Inputs, NodeContext, Result, node


@node("StringConcatenate")
async def concatenate(_context: NodeContext, inputs: Inputs) -> Result:
    """Two strings with a delimiter between them."""
    return Result((inputs["delimiter"].join((inputs["string_a"], inputs["string_b"])),))


@node("RegexReplace")
async def regex_replace(_context: NodeContext, inputs: Inputs) -> Result:
    """A regular expression replaced; a broken pattern raises `re.error`."""
    flags = re.NOFLAG
    if inputs.get("case_insensitive", True):
        flags |= re.IGNORECASE
    if inputs.get("multiline"):
        flags |= re.MULTILINE
    if inputs.get("dotall"):
        flags |= re.DOTALL
    text = re.sub(
        inputs["regex_pattern"],
        inputs["replace"],
        inputs["string"],
        count=inputs.get("count", 0),
        flags=flags,
    )
    return Result((text,))


@node("PrimitiveInt", "PrimitiveFloat", "PrimitiveString", "PrimitiveStringMultiline", "PrimitiveBoolean")
async def primitive(_context: NodeContext, inputs: Inputs) -> Result:
    """The value itself."""
    return Result((inputs["value"],))


@node("PreviewAny")
async def preview_any(_context: NodeContext, inputs: Inputs) -> Result:
    """Any value as text in the UI output."""
    return Result((), {"text": [as_text(inputs.get("source"))]})


def as_text(value: Any) -> str:
    """A value as PreviewAny shows it."""
    if isinstance(value, str):
        return value
    if isinstance(value, (int, float, bool)):
        return str(value)
    if value is None:
        return "None"
    try:
        return json.dumps(value, indent=4)
    except TypeError:
        return str(value)


@node("SaveText")
async def save_text(context: NodeContext, inputs: Inputs) -> Result:
    """A text file, and the text itself in the UI output."""
    text = inputs["text"]
    extension = inputs.get("format", "txt")
    place = context.folders.save_place(inputs["filename_prefix"], "output")
    number = place.number
    while (place.folder / (name := f"{place.stem}_{number:05}.{extension}")).exists():
        number += 1
    (place.folder / name).write_text(text, encoding="utf-8")
    return Result((text,), {"text": [text], "files": [place.item(name)]})
