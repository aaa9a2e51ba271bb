"""A history entry's outputs as output files; never fetches one, never takes ComfyUI's names for paths.

What counts as an output, for every node and every key (custom nodes use any):
- an object with a text `filename` is a file, however deep it lies; its key is the file's `kind`;
- a text under `text`, `texts`, `string` or `strings`, or a key that ends in `_text` or `_string`, is a text
  output;
- everything else is no output: flags such as `animated`, numbers, nulls, and texts under other keys, which
  are meant for ComfyUI's own pages, for example Preview3D's `result: [model_file, camera, background]`.
"""

import mimetypes
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from comfyd.tasks import Graph, OutputFile, OutputType

_FOLDERS: Final = frozenset({"output", "temp", "input"})
# ` [temp]` at the end of a name would silently switch the folder in /view (Q19)
_ANNOTATION = re.compile(r" ?\[(?P<folder>output|temp|input)\]$")
_TEXT_KIND = re.compile(r"(?:.*_)?(?:text|string)|texts|strings")
_DEEPEST: Final = 8

_TYPES: Final[dict[str, OutputType]] = {
    **dict.fromkeys(
        ("png", "jpg", "jpeg", "webp", "gif", "apng", "svg", "avif", "bmp", "tif", "tiff", "exr"),
        OutputType.IMAGE,
    ),
    **dict.fromkeys(("webm", "mp4", "mov", "mkv", "avi", "m4v"), OutputType.VIDEO),
    **dict.fromkeys(("flac", "wav", "mp3", "opus", "ogg", "m4a", "aac"), OutputType.AUDIO),
    "latent": OutputType.LATENT,
    "txt": OutputType.TEXT,
}

_CONTENT_TYPES: Final = {
    "aac": "audio/aac",
    "apng": "image/apng",
    "avif": "image/avif",
    "bmp": "image/bmp",
    "exr": "image/x-exr",
    "flac": "audio/flac",
    "gif": "image/gif",
    "glb": "model/gltf-binary",
    "gltf": "model/gltf+json",
    "jpeg": "image/jpeg",
    "jpg": "image/jpeg",
    "json": "application/json",
    "latent": "application/octet-stream",
    "m4a": "audio/mp4",
    "m4v": "video/x-m4v",
    "mkv": "video/x-matroska",
    "mov": "video/quicktime",
    "mp3": "audio/mpeg",
    "mp4": "video/mp4",
    "obj": "model/obj",
    "ogg": "audio/ogg",
    "opus": "audio/ogg",
    "ply": "model/ply",
    "png": "image/png",
    "safetensors": "application/octet-stream",
    "stl": "model/stl",
    "svg": "image/svg+xml",
    "tif": "image/tiff",
    "tiff": "image/tiff",
    "txt": "text/plain; charset=utf-8",
    "wav": "audio/wav",
    "webm": "video/webm",
    "webp": "image/webp",
}
# the machine's own tables are left out, so that the same name gives the same type everywhere
_KNOWN_ELSEWHERE: Final = mimetypes.MimeTypes(filenames=())

DEFAULT_CONTENT_TYPE: Final = "application/octet-stream"


def output_files(outputs: Mapping[str, Any]) -> tuple[OutputFile, ...]:
    """All outputs in `{node_id: {kind: ...}}`: by node id (2 before 10), within a node in ComfyUI's order.

    `index` counts within a node over everything found, so it does not depend on what is wanted later.
    """
    found: list[OutputFile] = []
    for node_id in sorted(outputs, key=_natural):
        kinds = outputs[node_id]
        if isinstance(kinds, dict):
            found.extend(_of_node(node_id, kinds))
    return tuple(found)


def wanted(files: Iterable[OutputFile], include_temp: bool) -> tuple[OutputFile, ...]:
    """What a client gets: texts and files in ComfyUI's `output` folder.

    Files in `temp` come along when they are asked for, or when there is no file in `output`. Files in `input`
    (some nodes show what they were given) come only when there is nothing else at all.
    """
    files = tuple(files)
    saved = any(file.text is None and file.folder == "output" for file in files)
    kept = tuple(
        file
        for file in files
        if file.text is not None
        or file.folder == "output"
        or (file.folder == "temp" and (include_temp or not saved))
    )
    return kept or files


def content_type(filename: str) -> str:
    """The media type by the name's extension; `application/octet-stream` where it is not known."""
    known = _CONTENT_TYPES.get(_extension(filename))
    if known is not None:
        return known
    guessed, encoding = _KNOWN_ELSEWHERE.guess_type(f"name.{_extension(filename)}")
    return guessed if guessed is not None and encoding is None else DEFAULT_CONTENT_TYPE


def websocket_image_nodes(graph: Graph) -> frozenset[str]:
    """The nodes that give their images as binary frames only: they are in no history entry."""
    return frozenset(
        node_id
        for node_id, node in graph.items()
        if isinstance(node, dict) and node.get("class_type") == "SaveImageWebsocket"
    )


def _of_node(node_id: str, kinds: Mapping[str, Any]) -> Iterator[OutputFile]:
    index = texts = 0
    for kind, value in kinds.items():
        if _TEXT_KIND.fullmatch(kind):
            for text in _texts(value):
                yield OutputFile(
                    node_id=node_id,
                    index=index,
                    kind=kind,
                    type=OutputType.TEXT,
                    filename=f"text_{texts}.txt" if texts else "text.txt",
                    text=text,
                )
                index, texts = index + 1, texts + 1
        for item in _items(value, _DEEPEST):
            yield _file(node_id, index, kind, item)
            index += 1


def _texts(value: Any) -> list[str]:
    """The texts of a text kind. ComfyUI tears a bare text into its characters: those are joined again."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        return []
    texts = [item for item in value if isinstance(item, str)]
    torn = len(texts) > 1 and all(len(text) == 1 for text in texts)
    return ["".join(texts)] if torn else texts


def _items(value: Any, depth: int) -> Iterator[dict[str, Any]]:
    """Every object with a file name."""
    if depth == 0:
        return
    if isinstance(value, list):
        for item in value:
            yield from _items(item, depth - 1)
    elif isinstance(value, dict):
        filename = value.get("filename")
        if isinstance(filename, str):
            if _ANNOTATION.sub("", filename):
                yield value
        else:
            yield from _items(list(value.values()), depth - 1)


def _file(node_id: str, index: int, kind: str, item: Mapping[str, Any]) -> OutputFile:
    filename: str = item["filename"]
    folder, subfolder = item.get("type"), item.get("subfolder")
    annotation = _ANNOTATION.search(filename)
    if annotation is not None:
        filename, folder = filename[: annotation.start()], annotation["folder"]
    return OutputFile(
        node_id=node_id,
        index=index,
        kind=kind,
        type=_TYPES.get(_extension(filename), OutputType.FILE),
        filename=filename,
        subfolder=subfolder if isinstance(subfolder, str) else "",
        folder=folder if isinstance(folder, str) and folder in _FOLDERS else "output",
    )


def _extension(filename: str) -> str:
    _stem, dot, extension = filename.rpartition(".")
    return extension.lower() if dot else ""


def _natural(node_id: str) -> list[tuple[int, int, str]]:
    """Sorts `2` before `10`, and `5.0.3` of an expanded node after `5`."""
    parts = re.findall(r"([0-9]{1,18})|([^0-9]+)", node_id)
    return [(0, int(digits), "") if digits else (1, 0, other) for digits, other in parts]
