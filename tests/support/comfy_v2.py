"""The official contract of the Comfy API v2, two judges of an answer: its document, and its SDK's models."""

from functools import cache
from pathlib import Path
from typing import Any, Final

import yaml
from comfy_low import models
from jsonschema import Draft202012Validator, FormatChecker  # type: ignore[import-untyped]  # it has no types

DOCUMENT: Final = Path(__file__).parents[1] / "data" / "comfy-api-v2.openapi.yaml"


@cache
def document() -> dict[str, Any]:
    """The whole document, with what may be null in the words of JSON Schema."""
    made: dict[str, Any] = _with_null(yaml.safe_load(DOCUMENT.read_text()))
    return made


@cache
def _validator(name: str) -> Draft202012Validator:
    schema = {"$ref": f"#/components/schemas/{name}", "components": document()["components"]}
    return Draft202012Validator(schema, format_checker=FormatChecker())


def check(name: str, answer: Any) -> None:
    """Raises unless the answer is what the contract calls this, by both judges."""
    _validator(name).validate(answer)
    getattr(models, name).model_validate(answer)


def check_job(answer: Any) -> Any:
    """The same for a job, which is returned; its metrics are whole numbers or null."""
    check("Job", answer)
    return answer


def check_error(answer: Any) -> tuple[str, str]:
    """The same for an error; its code and message."""
    check("ErrorEnvelope", answer)
    error = answer["error"]
    return error["code"], error["message"]


def _with_null(part: Any) -> Any:
    """OpenAPI 3.0 says `nullable`, beside a type or beside a reference."""
    if isinstance(part, list):
        return [_with_null(each) for each in part]
    if not isinstance(part, dict):
        return part
    made = {key: _with_null(value) for key, value in part.items()}
    if made.pop("nullable", False) is True:
        if "type" in made:
            made["type"] = [made["type"], "null"]
        else:
            made = {"anyOf": [made, {"type": "null"}]}
    return made
