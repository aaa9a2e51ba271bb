"""What a workflow template is; never parses, checks or renders one."""

from dataclasses import dataclass
from typing import Literal, get_args

from comfyd.graphs import Graph

InputType = Literal[
    "string", "text", "integer", "number", "boolean", "choice", "image", "mask", "video", "audio", "file"
]
INPUT_TYPES: tuple[str, ...] = get_args(InputType)
FILE_TYPES = frozenset({"image", "mask", "video", "audio", "file"})

Scalar = str | int | float | bool


@dataclass(frozen=True, kw_only=True)
class TemplateInput:
    """One named input of a template: which field of which node it sets and which values it takes.

    `text` is a string of several lines. A `default` of None means that there is none: then the graph keeps
    its own value, unless the input is `required` (it must be given) or `random` (an integer is drawn for
    each task). `optional` says that the graph itself may lack the field. `step` is a hint for forms and is
    not enforced.
    """

    name: str
    node: str  # the id
    field: str
    type: InputType
    title: str = ""
    description: str = ""
    default: Scalar | None = None
    minimum: int | float | None = None
    maximum: int | float | None = None
    step: int | float | None = None
    choices: tuple[Scalar, ...] = ()
    required: bool = False
    random: bool = False
    optional: bool = False


@dataclass(frozen=True, kw_only=True)
class WorkflowTemplate:
    """A graph with named, typed inputs; lives as long as its files stay as they are.

    The graph is shared by every task made from it and must not be changed. `version` stands for the content
    of the files: 16 hexadecimal digits.
    """

    name: str
    title: str
    description: str
    graph: Graph
    inputs: tuple[TemplateInput, ...]
    version: str
