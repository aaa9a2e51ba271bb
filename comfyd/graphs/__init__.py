"""Everything that can be said of an API-format graph; never asks ComfyUI, reads no file and keeps no state.

A graph is `{node_id: {"class_type": str, "inputs": {...}, "_meta": {...}}}`. An input is a literal or a link
`["node_id", slot]`; a literal list is wrapped as `{"__value__": [...]}`.

- `structure`: is this a graph at all, and one that cannot hurt ComfyUI? (`check_structure`)
- `classes`: would this ComfyUI, by its `/object_info`, run it? (`check_against`)
- `object_info`: what that says of each class.
- `files`: which inputs take files, and what may stand there?
- `edit`: addresses of inputs, and graphs made from graphs.
"""

from comfyd.graphs.classes import check_against, executable_nodes, missing_classes, output_nodes
from comfyd.graphs.edit import (
    Address,
    find_node,
    parse_address,
    replace_texts,
    rewrite_prefixes,
    safe_prefix,
    set_input,
    shape_key,
)
from comfyd.graphs.files import (
    UPLOAD_FILE,
    FileInput,
    check_kind,
    file_inputs,
    file_name_problem,
    is_reference,
    is_remote,
    references,
    remote_inputs,
    remote_values,
)
from comfyd.graphs.object_info import ObjectInfo
from comfyd.graphs.structure import (
    Graph,
    GraphLimits,
    check_structure,
    class_types,
    is_link,
    links,
    title,
)

__all__ = [
    "UPLOAD_FILE",
    "Address",
    "FileInput",
    "Graph",
    "GraphLimits",
    "ObjectInfo",
    "check_against",
    "check_kind",
    "check_structure",
    "class_types",
    "executable_nodes",
    "file_inputs",
    "file_name_problem",
    "find_node",
    "is_link",
    "is_reference",
    "is_remote",
    "links",
    "missing_classes",
    "output_nodes",
    "parse_address",
    "references",
    "remote_inputs",
    "remote_values",
    "replace_texts",
    "rewrite_prefixes",
    "safe_prefix",
    "set_input",
    "shape_key",
    "title",
]
