"""The prompts the conformance tests run: small ones made here, and the nine graphs of `tests/graphs`.

Every call gives another picture, so that no test meets a result another one left in the server's cache,
unless it keeps the graph on purpose.
"""

from __future__ import annotations

import json
import random
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from tests.conformance.raw_client import Graph

FOLDER: Final = Path(__file__).resolve().parents[1] / "graphs"
NAMES: Final = sorted(path.stem for path in FOLDER.glob("*.json"))


def prefix() -> str:
    """A `filename_prefix` in a folder nobody else uses."""
    return f"conformance/{uuid.uuid4().hex}/image"


def color() -> int:
    """A color nobody else uses, most probably."""
    return random.randrange(1, 2**24)


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    """One node; a link is `["node id", slot]`."""
    return {"class_type": class_type, "inputs": inputs}


def empty_image(size: int = 16, batch_size: int = 1) -> dict[str, Any]:
    """A source of one-color pictures that costs nothing."""
    return node("EmptyImage", width=size, height=size, batch_size=batch_size, color=color())


def picture(*, size: int = 16, batch_size: int = 1, filename_prefix: str | None = None) -> Graph:
    """Two nodes, `1` and `9`: the smallest prompt that saves pictures."""
    return {
        "1": empty_image(size, batch_size),
        "9": node("SaveImage", images=["1", 0], filename_prefix=filename_prefix or prefix()),
    }


def chain() -> Graph:
    """Three nodes in a row, `1`, `2` and `9`, so that their order is certain."""
    return {
        "1": empty_image(),
        "2": node("ImageInvert", image=["1", 0]),
        "9": node("SaveImage", images=["2", 0], filename_prefix=prefix()),
    }


def text(words: str) -> Graph:
    """Two nodes, `1` and `9`, that show a text and write no file."""
    return {
        "1": node("StringConcatenate", string_a=words, string_b=uuid.uuid4().hex, delimiter=" "),
        "9": node("PreviewAny", source=["1", 0]),
    }


def failing() -> Graph:
    """Three nodes in a row of which the second, `2`, passes validation and raises `re.error`."""
    return {
        "1": node("StringConcatenate", string_a="a", string_b=uuid.uuid4().hex, delimiter=""),
        "2": node(
            "RegexReplace",
            string=["1", 0],
            regex_pattern="(unclosed",
            replace="x",
            case_insensitive=True,
            multiline=False,
            dotall=False,
            count=0,
        ),
        "9": node("PreviewAny", source=["2", 0]),
    }


def blocker() -> Graph:
    """A prompt that keeps the server busy for seconds, in steps, so that it ends soon once interrupted."""
    return {
        "1": node("EmptyImage", width=2048, height=2048, batch_size=4, color=color()),
        "2": node("VAELoader", vae_name="pixel_space"),
        "3": node("VAEEncode", pixels=["1", 0], vae=["2", 0]),
        "4": decode("3", tile_size=512, overlap=256),
        "5": node("VAEEncode", pixels=["4", 0], vae=["2", 0]),
        "6": decode("5", tile_size=512, overlap=256),
        "7": node("VAEEncode", pixels=["6", 0], vae=["2", 0]),
        "8": decode("7", tile_size=512, overlap=256),
        "9": node("SaveImage", images=["8", 0], filename_prefix=prefix()),
    }


def stepping() -> Graph:
    """A prompt of a fraction of a second whose node `4` reports each of its steps."""
    return {
        "1": node("EmptyImage", width=512, height=512, batch_size=1, color=color()),
        "2": node("VAELoader", vae_name="pixel_space"),
        "3": node("VAEEncode", pixels=["1", 0], vae=["2", 0]),
        "4": decode("3", tile_size=128, overlap=32),
        "9": node("SaveImage", images=["4", 0], filename_prefix=prefix()),
    }


def decode(source: str, *, tile_size: int, overlap: int) -> dict[str, Any]:
    """The node that reports a step for each tile, reading node `source` and the VAE of node `2`."""
    sizes = {"tile_size": tile_size, "overlap": overlap, "temporal_size": 64, "temporal_overlap": 8}
    return node("VAEDecodeTiled", samples=[source, 0], vae=["2", 0], **sizes)


def named(name: str) -> Graph:
    """One of the nine graphs, with prefixes and colors of its own."""
    graph: Graph = json.loads((FOLDER / f"{name}.json").read_text())
    folder = uuid.uuid4().hex
    for item in graph.values():
        inputs = item["inputs"]
        if "filename_prefix" in inputs:
            inputs["filename_prefix"] = f"conformance/{folder}/{inputs['filename_prefix']}"
        if "color" in inputs:
            inputs["color"] = color()
    return graph
