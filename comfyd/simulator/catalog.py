"""The node classes a simulated ComfyUI knows: their `/object_info` entries and the specs validation reads.

The entries in `object_info.json` are those of a real 0.3.75 server, reduced to the classes that the simulator
can run; `object_info_0.33.json` holds what 0.33.0 adds or changes. Model and file lists are filled in here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import orjson

if TYPE_CHECKING:
    from comfyd.simulator.folders import Folders
    from comfyd.simulator.options import SimulatorOptions

DYNAMIC_COMBO: Final = "COMFY_DYNAMICCOMBO_V3"
FILE_INPUTS: Final = {"LoadImage": "image", "LoadImageMask": "image"}


@dataclass(frozen=True, slots=True)
class InputSpec:
    """One input of a class: `kind` is a type name or, for an old combo, the list of its values."""

    name: str
    required: bool
    kind: str | list[Any]
    options: dict[str, Any]

    @property
    def config(self) -> list[Any]:
        """The spec as validation errors quote it."""
        return [self.kind, self.options]

    @property
    def choices(self) -> list[Any] | None:
        """The values of a combo, old style or new; None for anything else."""
        if isinstance(self.kind, list):
            return self.kind
        return self.options.get("options") if self.kind == "COMBO" else None


@dataclass(frozen=True, slots=True)
class NodeClass:
    """What validation and the scheduler need to know of a class."""

    name: str
    inputs: dict[str, InputSpec]
    outputs: tuple[Any, ...]
    is_output: bool
    takes_prompt: bool  # an old-style class with the hidden inputs `prompt` and `extra_pnginfo`


class Catalog:
    """All classes of one server. Lives as long as the simulator; file lists are read anew on each request."""

    def __init__(self, options: SimulatorOptions, folders: Folders) -> None:
        self._folders = folders
        self._documents = load_documents(options)
        self.classes = {name: parse_class(name, entry) for name, entry in self._documents.items()}

    def document(self, name: str) -> dict[str, Any] | None:
        """The `/object_info` entry of a class with the present file lists; None for an unknown class."""
        entry = self._documents.get(name)
        if entry is None or name not in FILE_INPUTS:
            return entry
        field = FILE_INPUTS[name]
        _, *rest = entry["input"]["required"][field]
        files = self._folders.input_files(pictures_only=name == "LoadImage")
        required = {**entry["input"]["required"], field: [files, *rest]}
        return {**entry, "input": {**entry["input"], "required": required}}

    def documents(self) -> dict[str, Any]:
        """The whole `/object_info`."""
        return {name: self.document(name) for name in self._documents}


def load_documents(options: SimulatorOptions) -> dict[str, Any]:
    """The packaged entries of the flavor, with the models of the options."""
    documents: dict[str, Any] = orjson.loads(_data("object_info.json"))
    if options.behaviour.jobs_api:
        for entry in documents.values():
            entry |= {"is_input_list": False, "has_intermediate_output": False, "search_aliases": []}
        documents |= orjson.loads(_data("object_info_0.33.json"))
    documents["CheckpointLoaderSimple"]["input"]["required"]["ckpt_name"][0] = list(options.checkpoints)
    documents["LoraLoader"]["input"]["required"]["lora_name"][0] = list(options.loras)
    return documents


def parse_class(name: str, entry: dict[str, Any]) -> NodeClass:
    """An `/object_info` entry as a `NodeClass`; hidden inputs are left out, the server fills them."""
    specs: dict[str, InputSpec] = {}
    for section in ("required", "optional"):
        specs |= parse_inputs(entry["input"].get(section, {}), required=section == "required")
    takes_prompt = entry["input"].get("hidden", {}).get("prompt") == "PROMPT"
    return NodeClass(name, specs, tuple(entry["output"]), entry["output_node"], takes_prompt)


def parse_inputs(section: dict[str, Any], *, required: bool, prefix: str = "") -> dict[str, InputSpec]:
    """The specs of one section, keyed by `prefix` + name."""
    return {
        prefix + name: InputSpec(prefix + name, required, kind, rest[0] if rest else {})
        for name, (kind, *rest) in section.items()
    }


def _data(name: str) -> bytes:
    return Path(__file__).with_name(name).read_bytes()
