"""Which inputs of a graph take files, and what may stand there; never fetches or opens one."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from comfyd.errors import UnsupportedContent
from comfyd.graphs.edit import Address
from comfyd.graphs.object_info import ObjectInfo, Spec, class_of, literal, specs_of
from comfyd.graphs.structure import Graph, is_link

UPLOAD_FILE: Final = r"[0-9a-f]{64}\.[a-z0-9]{1,16}"
"""What an upload is called; its reference is `upload:` and that."""

WELL_KNOWN_FILES = {
    ("LoadImage", "image"): "image",
    ("LoadImageMask", "image"): "image",
    ("LoadImageOutput", "image"): "image",
    ("LoadAudio", "audio"): "audio",
    ("LoadVideo", "file"): "video",
    ("LoadLatent", "latent"): "file",
}
_FITTING = {
    "image": {"image"},
    "audio": {"audio", "video"},  # ComfyUI takes the sound of a video
    "video": {"video"},
    "file": {"image", "audio", "video", "file"},
}
_SEEN_OR_HEARD = re.compile(
    r"\.(?:png|jpe?g|webp|gif|bmp|tiff?|avif|mp4|m4v|mov|webm|mkv|avi|wav|mp3|flac|ogg|opus|m4a|aac)$",
    re.IGNORECASE,
)
_MOVING = {"image/gif", "image/webp", "image/apng"}  # pictures that ComfyUI also reads as videos
_REMOTE = re.compile(r"\s*(?:https?:|data:|upload:)", re.IGNORECASE)
_UPLOAD = re.compile(rf"upload:{UPLOAD_FILE}")
_ADDRESS = re.compile(r"\s*[a-z][a-z0-9+.-]*://", re.IGNORECASE)  # of whatever kind


@dataclass(frozen=True, kw_only=True)
class FileInput:
    """A literal input that names a file in one of ComfyUI's folders, or that is to be brought there.

    `kind`: image, audio, video or file.
    """

    node_id: str
    name: str
    value: str
    kind: str


def file_inputs(graph: Graph, object_info: ObjectInfo | None) -> list[FileInput]:
    """The literal inputs that choose a file, by the upload flags of the class or, unknown, by well-known
    names; and those that choose among pictures, sounds or videos where the value is remote."""
    found = []
    for node_id, node in graph.items():
        class_type = node["class_type"]
        kinds = {name: kind for (owner, name), kind in WELL_KNOWN_FILES.items() if owner == class_type}
        if object_info is not None and class_type in object_info:
            for spec in specs_of(class_of(object_info, class_type)):
                kind = file_kind(spec.options)
                if kind is not None:
                    kinds[spec.name] = kind
                elif _only_fits_a_file(literal(node["inputs"].get(spec.name)), spec):
                    kinds.setdefault(spec.name, "file")
        for name, kind in kinds.items():
            value = literal(node["inputs"].get(name))
            if isinstance(value, str):
                found.append(FileInput(node_id=node_id, name=name, value=value, kind=kind))
    return found


def _only_fits_a_file(value: object, spec: Spec) -> bool:
    """Whether a remote value stands where there is a choice of files to see or hear, and is none of them.

    A choice of models is none: what is missing there is told at once.
    """
    choices = spec.options.get("options") if spec.kind == "COMBO" else spec.kind
    if not is_remote(value) or not isinstance(choices, list) or value in choices:
        return False
    if spec.options.get("remote") or spec.options.get("multiselect"):
        return False
    return not choices or any(isinstance(choice, str) and _SEEN_OR_HEARD.search(choice) for choice in choices)


def is_remote(value: object) -> bool:
    """Whether this value of a file input is not yet the name of a file on ComfyUI's machine: an http(s) url,
    a data URI or the reference of an upload."""
    return isinstance(value, str) and _REMOTE.match(value) is not None


def check_kind(wanted: FileInput, kind: str, content_type: str) -> None:
    """Raise `UnsupportedContent` where a file of this kind and media type is nothing for that input."""
    if kind in _FITTING[wanted.kind] or (wanted.kind == "video" and content_type in _MOVING):
        return
    place = f"{wanted.node_id}.{wanted.name}"
    raise UnsupportedContent(
        f"input {place} takes a file of the kind {wanted.kind}, and this is {content_type}",
        details={"input": place, "content_type": content_type},
    )


def remote_values(graph: Graph) -> bool:
    """Whether any value at all looks remote: only then is it worth asking which inputs take files."""
    return any(_is_elsewhere(literal(value)) for node in graph.values() for value in node["inputs"].values())


def remote_inputs(graph: Graph, object_info: ObjectInfo | None) -> list[FileInput]:
    """The file inputs whose files have to be brought to ComfyUI; also those with an address of another kind
    than is fetched (`ftp://`), which name no file of ComfyUI's either."""
    if not remote_values(graph):
        return []
    return [found for found in file_inputs(graph, object_info) if _is_elsewhere(found.value)]


def is_reference(value: object) -> bool:
    """Whether this is the reference of an upload, and nothing else: a file wherever it stands in an input."""
    return isinstance(value, str) and value.startswith("upload:") and _UPLOAD.fullmatch(value) is not None


def references(graph: Graph) -> dict[str, Address]:
    """Every reference of an upload in the inputs of a checked graph, however deep, and the first input that
    holds it."""
    found: dict[str, Address] = {}
    for node_id, node in graph.items():
        for name, value in node["inputs"].items():
            pending = [] if is_link(value) else [value]
            while pending:
                inner = pending.pop()
                if isinstance(inner, dict):
                    pending.extend(inner.values())
                elif isinstance(inner, list):
                    pending.extend(inner)
                elif is_reference(inner):
                    found.setdefault(inner, Address(node_id=node_id, name=name))
    return found


def _is_elsewhere(value: object) -> bool:
    return is_remote(value) or (isinstance(value, str) and _ADDRESS.match(value) is not None)


def file_name_problem(value: str) -> str | None:
    """Say why a name may not stand for a file in ComfyUI's folders, or return None.

    ComfyUI 0.3.75 takes absolute paths and `..` and would read any file of its machine (protocol, section
    10). The suffixes ` [input]`, ` [output]` and ` [temp]` choose the folder and are not judged here.
    """
    name = re.sub(r"\s*\[(?:input|output|temp)\]\s*$", "", value)
    if not name.strip():
        return "names no file"
    if re.search(r"[\x00-\x1f\x7f]", value):
        return "holds control characters"
    if "\\" in name:
        return "holds a backslash: folders are separated by /"
    if name.startswith(("/", "~")) or re.match(r"[A-Za-z]:", name):
        return "is an absolute path: name a file of ComfyUI's input folder"
    if any(part.strip() == ".." for part in name.split("/")):
        return "leaves ComfyUI's folder with .."
    return None


def file_kind(options: Mapping[str, Any]) -> str | None:
    """What the upload flag of an input says that it takes; None without one."""
    for key, value in options.items():
        if value is True and key.endswith("_upload"):
            # image_upload, animated_image_upload, video_upload, audio_upload, file_upload and later ones
            kind = key.removesuffix("_upload").rpartition("_")[2]
            return kind if kind in {"image", "audio", "video"} else "file"
    return None
