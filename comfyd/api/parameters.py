"""Parameters of routes, as the OpenAPI document describes them; never how they are read."""

from typing import Any, Final, get_args

import msgspec

from comfyd.api.comfyui import BACKEND_HEADER
from comfyd.api.requests import IDEMPOTENCY_KEY, PAGE
from comfyd.api.schemas import METADATA_PAIRS, WEBHOOK_URL
from comfyd.config import StorageName
from comfyd.tasks import EventType, PictureFormat


class Parameter(msgspec.Struct, frozen=True, kw_only=True):
    """One parameter of a route."""

    name: str
    place: str = "query"
    description: str
    schema: dict[str, Any]
    required: bool = False
    deep: bool = False
    """Written as `name[key]=value`."""
    listed: bool = False
    """Written as `name=a,b`."""


STRING: Final[dict[str, Any]] = {"type": "string"}
BOOLEAN: Final[dict[str, Any]] = {"type": "boolean", "default": False}
TASK: Final = Parameter(
    name="task_id",
    place="path",
    description="The task.",
    schema={"type": "string", "format": "uuid"},
    required=True,
)
NAME: Final = Parameter(name="name", place="path", description="The template.", schema=STRING, required=True)
WAIT: Final = Parameter(
    name="wait",
    description="Answer when the task has ended, or after this many seconds; cut to `limits.wait`.",
    schema={"type": "number", "minimum": 0},
)
PREFER: Final = Parameter(
    name="Prefer", place="header", description="`wait=N`: the same as `?wait=N`.", schema=STRING
)
KEY: Final = Parameter(
    name="Idempotency-Key",
    place="header",
    description="The same request under the same key is answered with the first task again.",
    schema={"type": "string", "minLength": 1, "maxLength": IDEMPOTENCY_KEY},
)
KEY_ONCE: Final = Parameter(
    name="Idempotency-Key",
    place="header",
    description="Good for one job: every later request with it is 422 `idempotency_key_reuse`.",
    schema={"type": "string", "minLength": 1, "maxLength": IDEMPOTENCY_KEY},
)
BACKEND: Final = Parameter(
    name=BACKEND_HEADER,
    place="header",
    description="Which ComfyUI, by its name; by default the first that is ready.",
    schema=STRING,
)
METADATA: Final = Parameter(
    name="metadata",
    description="As `metadata[key]=value`.",
    schema={"type": "object", "additionalProperties": STRING, "maxProperties": METADATA_PAIRS},
    deep=True,
)
REST: Final = Parameter(
    name="path", place="path", description="The path in ComfyUI's own API.", schema=STRING, required=True
)
CURSOR: Final = Parameter(name="cursor", description="`next_cursor` of the page before.", schema=STRING)
LIMIT: Final = Parameter(
    name="limit",
    description="How many on a page; at most `limits.list_page`.",
    schema={"type": "integer", "minimum": 1, "default": PAGE},
)
DELIVERY: Final = Parameter(
    name="delivery_id",
    place="path",
    description="The delivery: its `webhook-id`.",
    schema=STRING,
    required=True,
)
SIGNED: Final = tuple(
    Parameter(name=name, place="header", description=description, schema=STRING, required=True)
    for name, description in (
        ("webhook-id", "Names the message; the same on every try."),
        ("webhook-timestamp", "When this try was made, in seconds since 1970."),
        ("webhook-signature", "One or more signatures `v1,…`, with blanks between."),
    )
)
"""The headers of a message to a webhook."""
POSITIVE: Final[dict[str, Any]] = {"type": "number", "exclusiveMinimum": 0}
RUN: Final = (
    Parameter(
        name="priority",
        description="Higher first: -1000 to 1000, or low, normal, high.",
        schema={
            "anyOf": [
                {"type": "integer", "minimum": -1000, "maximum": 1000},
                {"enum": ["low", "normal", "high"]},
            ],
            "default": 0,
        },
    ),
    Parameter(
        name="max_attempts",
        description="How often the task may be tried.",
        schema={"type": "integer", "minimum": 1, "maximum": 100},
    ),
    Parameter(name="timeout", description="Seconds that ComfyUI may execute the prompt.", schema=POSITIVE),
    Parameter(
        name="start_timeout", description="Seconds that the prompt may wait inside ComfyUI.", schema=POSITIVE
    ),
    Parameter(
        name="include_temp",
        description="Also keep ComfyUI's temporary previews.",
        schema=BOOLEAN,
    ),
    Parameter(
        name="output.storage",
        description="Where the outputs go; one that is configured.",
        schema={"enum": list(get_args(StorageName))},
    ),
    Parameter(name="output.prefix", description="Folders before their names in the storage.", schema=STRING),
    Parameter(
        name="output.format",
        description="Convert pictures to this.",
        schema={"enum": list(get_args(PictureFormat))},
    ),
    Parameter(
        name="output.quality",
        description="Of jpeg, webp and avif.",
        schema={"type": "integer", "minimum": 1, "maximum": 100},
    ),
    Parameter(
        name="output.metadata",
        description="`strip` takes prompts and other metadata out of the files.",
        schema={"enum": ["keep", "strip"], "default": "keep"},
    ),
    Parameter(
        name="output.inline", description="Show small outputs in the task itself, in base64.", schema=BOOLEAN
    ),
    Parameter(
        name="webhook_url",
        description="Where to send signed messages of what becomes of the task.",
        schema={"type": "string", "maxLength": WEBHOOK_URL},
    ),
    Parameter(
        name="webhook_events",
        description="What to tell of, with commas between; by default how the task ends, in any way.",
        schema={
            "type": "array",
            "items": {"enum": [str(word) for word in EventType]},
            "minItems": 1,
            "uniqueItems": True,
        },
        listed=True,
    ),
    METADATA,
    WAIT,
    PREFER,
    KEY,
)
RUN_QUERY: Final = tuple(
    f"{each.name}[key]" if each.deep else each.name for each in RUN if each.place == "query"
)
"""What may stand in the query of such a request."""
