"""The templates that come with comfyd: each must work as it is, on what a real ComfyUI says of itself."""

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]  # ships no types

from comfyd.catalog import Catalog
from comfyd.graphs import check_against, file_inputs
from comfyd.workflows import TemplateInput, json_schema, parse_template, render, template_toml

FOLDER = Path(__file__).parents[1] / "workflows"
INFO: dict[str, Any] = json.loads((Path(__file__).parent / "data" / "object_info-0.3.75.json").read_bytes())
NAMES = ["image-to-image", "noise-image", "text-to-image"]
NEEDED = {"text-to-image": {"prompt": "a fox"}, "image-to-image": {"prompt": "a fox", "image": "fox.png"}}


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    made = Catalog(FOLDER)
    made.refresh()
    return made


@pytest.fixture(scope="module")
def object_info() -> dict[str, Any]:
    """What ComfyUI 0.3.75 answered, as if the checkpoint were installed."""
    info = copy.deepcopy(INFO)
    info["CheckpointLoaderSimple"]["input"]["required"]["ckpt_name"][0] = [
        "v1-5-pruned-emaonly-fp16.safetensors"
    ]
    return info


def test_all_are_read_without_a_problem(catalog: Catalog) -> None:
    assert [template.name for template in catalog.list()] == NAMES
    assert catalog.problems() == ()


@pytest.mark.parametrize("name", NAMES)
def test_a_real_comfyui_would_run_it(catalog: Catalog, object_info: dict[str, Any], name: str) -> None:
    rendered = render(catalog.get(name), NEEDED.get(name, {}), random.Random(1))
    check_against(rendered.graph, object_info)


@pytest.mark.parametrize("name", NAMES)
def test_every_value_that_an_input_allows_is_one_that_comfyui_takes(
    catalog: Catalog, object_info: dict[str, Any], name: str
) -> None:
    template = catalog.get(name)
    for spec in template.inputs:
        for value in extremes(spec):
            values = {**NEEDED.get(name, {}), spec.name: value}
            check_against(render(template, values, random.Random(1)).graph, object_info)


def extremes(spec: TemplateInput) -> list[Any]:
    ends = [spec.minimum, spec.maximum, spec.default, *spec.choices]
    return [value for value in ends if value is not None]


@pytest.mark.parametrize("name", NAMES)
def test_a_newcomer_finds_a_title_and_a_description_everywhere(catalog: Catalog, name: str) -> None:
    template = catalog.get(name)
    assert template.title
    assert template.description.endswith(".")
    for spec in template.inputs:
        assert spec.title, spec.name
        assert spec.description.endswith("."), spec.name
    Draft202012Validator.check_schema(json_schema(template))


@pytest.mark.parametrize("name", NAMES)
def test_two_runs_differ_by_their_seed(catalog: Catalog, name: str) -> None:
    chance = random.Random(1)
    seeds = {render(catalog.get(name), NEEDED.get(name, {}), chance).inputs["seed"] for _ in range(5)}
    assert len(seeds) == 5


def test_the_noise_image_needs_nothing_that_has_to_be_installed_or_given(catalog: Catalog) -> None:
    template = catalog.get("noise-image")
    assert json_schema(template)["required"] == []
    assert file_inputs(template.graph, INFO) == []
    check_against(template.graph, INFO)


@pytest.mark.parametrize("name", NAMES)
def test_the_inputs_would_be_found_without_the_toml_too(catalog: Catalog, name: str) -> None:
    text = (FOLDER / f"{name}.json").read_bytes()
    found = parse_template(name, text, None)
    described = {(spec.node, spec.field) for spec in catalog.get(name).inputs}
    missed = described - {(spec.node, spec.field) for spec in found.inputs}
    assert missed <= {("3", "blur_radius")}
    assert parse_template(name, text, template_toml(found).encode()).inputs == found.inputs
