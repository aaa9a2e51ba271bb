"""The inputs of a graph that nobody described: prompts, seeds, sizes, steps, files; never asks ComfyUI.

By the field names of ComfyUI's own nodes, which custom nodes follow; prompts by following the links of the
samplers.
"""

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from comfyd.graphs import Graph, file_inputs, is_link, title
from comfyd.workflows.templates import InputType, TemplateInput
from comfyd.workflows.values import MAX_INTEGER, fit_value


@dataclass(frozen=True)
class _Field:
    """What a field of this name is in any node."""

    name: str
    title: str
    type: InputType
    minimum: int | float | None = None
    maximum: int | float | None = None
    random: bool = False


_MAX_SIDE = 16384  # ComfyUI's MAX_RESOLUTION
_FIELDS = {
    "seed": _Field("seed", "Seed", "integer", 0, MAX_INTEGER, random=True),
    "noise_seed": _Field("seed", "Seed", "integer", 0, MAX_INTEGER, random=True),
    "width": _Field("width", "Width in pixels", "integer", 1, _MAX_SIDE),
    "height": _Field("height", "Height in pixels", "integer", 1, _MAX_SIDE),
    "length": _Field("length", "Number of frames", "integer", 1, _MAX_SIDE),
    "fps": _Field("fps", "Frames per second", "number", 0, 1000),
    "frame_rate": _Field("fps", "Frames per second", "number", 0, 1000),
    "seconds": _Field("seconds", "Seconds", "number", 0),
    "batch_size": _Field("batch_size", "Number of images", "integer", 1, 4096),
    "steps": _Field("steps", "Steps", "integer", 1, 10_000),
    "cfg": _Field("cfg", "CFG scale", "number", 0, 100),
    "guidance": _Field("guidance", "Guidance", "number", 0, 100),
    "denoise": _Field("denoise", "Denoise", "number", 0, 1),
    "sampler_name": _Field("sampler", "Sampler", "string"),
    "scheduler": _Field("scheduler", "Scheduler", "string"),
    "ckpt_name": _Field("checkpoint", "Checkpoint", "string"),
    "unet_name": _Field("model", "Diffusion model", "string"),
    "lora_name": _Field("lora", "LoRA", "string"),
    "strength_model": _Field("lora_strength", "LoRA strength", "number"),
    "strength": _Field("strength", "Strength", "number"),
    "color": _Field("color", "Color as a number, 0xRRGGBB", "integer", 0, 0xFFFFFF),
}
_TEXT_FIELDS = ("text", "prompt", "text_g", "text_l", "clip_g", "clip_l", "t5xxl")
_STRING_FIELDS = ("value", "string", "text", "prompt")
_HOPS = 50


def discover_inputs(graph: Graph) -> tuple[TemplateInput, ...]:
    """Return the inputs of a checked graph: prompts first, then files, then the rest in the graph's order.

    Their defaults are the graph's own values, so that a task without inputs runs the graph as it was
    exported; only seeds are drawn. Names are unique: `seed`, `seed_2`.
    """
    found = [*_prompts(graph)]
    found += _files(graph)
    taken = {(spec.node, spec.field) for spec in found}
    for node_id in graph:
        found += [spec for spec in _settings(graph, node_id) if (spec.node, spec.field) not in taken]
    return _named(graph, found)


def _prompts(graph: Graph) -> Iterator[TemplateInput]:
    places = _conditioning_texts(graph)
    for node_id, node in graph.items():
        if "TextEncode" in node["class_type"]:
            negative = "negative" in title(graph, node_id).casefold()
            for place in _texts(graph, node_id):
                places.setdefault(place, "negative" if negative else "positive")
    for wanted in ("positive", "negative"):
        for node_id, node in graph.items():
            for field in node["inputs"]:
                if places.get((node_id, field)) == wanted:
                    yield TemplateInput(
                        name="prompt" if wanted == "positive" else "negative_prompt",
                        title="Prompt" if wanted == "positive" else "Negative prompt",
                        node=node_id,
                        field=field,
                        type="text",
                        default=node["inputs"][field],
                    )


def _conditioning_texts(graph: Graph) -> dict[tuple[str, str], str]:
    """Map (node id, field) of each text that conditions a sampler to `positive` or `negative`."""
    places: dict[tuple[str, str], str] = {}
    seen: set[tuple[str, str]] = set()
    pending: list[tuple[str, str]] = []
    for node in graph.values():
        inputs = node["inputs"]
        pending += [(inputs[role][0], role) for role in ("negative", "positive") if is_link(inputs.get(role))]
        if "Guider" in node["class_type"] and is_link(inputs.get("conditioning")):
            pending.append((inputs["conditioning"][0], "positive"))
    while pending:
        node_id, role = pending.pop()  # positive ones first: one text for both is the prompt
        if (node_id, role) in seen:
            continue
        seen.add((node_id, role))
        texts = _texts(graph, node_id)
        for place in texts:
            if places.get(place) != "positive":
                places[place] = role
        if not texts:
            inputs = graph[node_id]["inputs"]
            passing = [role] if is_link(inputs.get(role)) else [name for name in inputs if "cond" in name]
            pending += [(inputs[name][0], role) for name in passing if is_link(inputs[name])]
    return places


def _texts(graph: Graph, node_id: str) -> list[tuple[str, str]]:
    """The places of the texts that a node encodes: its own fields, or those of the strings linked to them."""
    inputs = graph[node_id]["inputs"]
    places = []
    for field in _TEXT_FIELDS:
        value = inputs.get(field)
        place = (node_id, field) if isinstance(value, str) else None
        if is_link(value):
            place = _string_source(graph, value[0])
        if place is not None and place not in places:
            places.append(place)
    return places


def _string_source(graph: Graph, node_id: str) -> tuple[str, str] | None:
    """Follow a linked string to the node that holds it, as long as there is one way to go."""
    for _ in range(_HOPS):
        inputs = graph[node_id]["inputs"]
        for field in _STRING_FIELDS:
            if isinstance(inputs.get(field), str):
                return node_id, field
        linked = [inputs[field][0] for field in _STRING_FIELDS if is_link(inputs.get(field))]
        if len(linked) != 1:
            return None
        node_id = linked[0]
    return None


def _files(graph: Graph) -> Iterator[TemplateInput]:
    for found in file_inputs(graph, None):
        kind: InputType = "file"
        if found.kind in {"image", "audio", "video"}:
            kind = "mask" if graph[found.node_id]["class_type"] == "LoadImageMask" else found.kind  # type: ignore[assignment]  # one of three
        spec = TemplateInput(
            name=kind, title=kind.capitalize(), node=found.node_id, field=found.name, type=kind
        )
        fits = fit_value(spec, found.value)[1] is None
        yield replace(spec, default=found.value if fits else None, required=not fits)


def _settings(graph: Graph, node_id: str) -> Iterator[TemplateInput]:
    node = graph[node_id]
    class_type = node["class_type"]
    if class_type.startswith("Primitive"):
        yield from _primitive(graph, node_id)
        return
    if "TextEncode" in class_type:
        return  # sizes there are hints to the model, not the picture's size
    for name, value in node["inputs"].items():
        known = _FIELDS.get(name)
        if known is None:
            continue
        spec = TemplateInput(
            name=known.name,
            title=known.title,
            node=node_id,
            field=name,
            type=known.type,
            minimum=known.minimum,
            maximum=known.maximum,
            random=known.random,
        )
        yield from _with_default(spec, value)


def _primitive(graph: Graph, node_id: str) -> Iterator[TemplateInput]:
    """A primitive node is a knob that the author made: its title is the name."""
    value = graph[node_id]["inputs"].get("value")
    kinds: dict[type, InputType] = {bool: "boolean", int: "integer", float: "number", str: "string"}
    kind = kinds.get(type(value))
    if kind is None:
        return
    if kind == "string" and "Multiline" in graph[node_id]["class_type"]:
        kind = "text"
    name = _slug(title(graph, node_id)) or f"value_{_slug(node_id) or 'x'}"
    seed = kind == "integer" and (name == "seed" or name.endswith("_seed"))
    spec = TemplateInput(
        name=name,
        title=title(graph, node_id),
        node=node_id,
        field="value",
        type=kind,
        minimum=0 if seed else None,
        maximum=MAX_INTEGER if seed else None,
        random=seed,
    )
    yield from _with_default(spec, value)


def _with_default(spec: TemplateInput, value: Any) -> Iterator[TemplateInput]:
    """The input with the graph's value as default; none if the value is a link or of another type."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        # What the graph says is always allowed: 0 is a size that means 'keep' in some nodes.
        if spec.minimum is not None and value < spec.minimum:
            spec = replace(spec, minimum=value)
        if spec.maximum is not None and value > spec.maximum:
            spec = replace(spec, maximum=value)
    fitted, problem = fit_value(spec, value)
    if problem is None:
        yield spec if spec.random else replace(spec, default=fitted)


def _named(graph: Graph, found: list[TemplateInput]) -> tuple[TemplateInput, ...]:
    """Number the names that come twice, and say in the title which node is meant."""
    wanted = [spec.name for spec in found]
    taken: set[str] = set()
    named = []
    for spec in found:
        name, number = spec.name, 1
        while name in taken or (number > 1 and name in wanted):
            number += 1
            name = f"{spec.name}_{number}"
        taken.add(name)
        heading = spec.title
        if wanted.count(spec.name) > 1:
            heading = f"{spec.title} ({title(graph, spec.node)})"
        named.append(replace(spec, name=name, title=heading))
    return tuple(named)


def _slug(text: str) -> str:
    """The text as a name: lower-case ASCII letters, digits and `_`, a letter first; empty if nothing is
    left."""
    plain = unicodedata.normalize("NFKD", text.casefold()).encode("ascii", "ignore").decode()
    return re.sub(r"^[^a-z]+", "", re.sub(r"[^a-z0-9]+", "_", plain)).strip("_")[:40]
