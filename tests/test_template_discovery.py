"""`comfyd.workflows.discovery`: the inputs that a newcomer expects, from graphs that nobody described."""

import json
import random
from typing import Any

import pytest

from comfyd.graphs import GraphLimits, check_structure
from comfyd.workflows import TemplateInput, discover_inputs, parse_template, render, template_toml


def node(class_type: str, title: str | None = None, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs, "_meta": {"title": title} if title else {}}


def found(**nodes: dict[str, Any]) -> dict[str, TemplateInput]:
    graph = check_structure({name.lstrip("n"): value for name, value in nodes.items()}, GraphLimits())
    return {item.name: item for item in discover_inputs(graph)}


def places(inputs: dict[str, TemplateInput]) -> dict[str, tuple[str, str]]:
    return {name: (item.node, item.field) for name, item in inputs.items()}


def sampler(positive: str, negative: str, **more: Any) -> dict[str, Any]:
    return node("KSampler", seed=1, steps=20, cfg=7.0, positive=[positive, 0], negative=[negative, 0], **more)


def test_prompts_are_told_apart_by_the_links_of_the_sampler_not_by_order() -> None:
    inputs = found(
        n1=node("CLIPTextEncode", text="bad things"),
        n2=node("CLIPTextEncode", text="good things"),
        n3=sampler("2", "1"),
    )
    assert places(inputs) == {
        "prompt": ("2", "text"),
        "negative_prompt": ("1", "text"),
        "seed": ("3", "seed"),
        "steps": ("3", "steps"),
        "cfg": ("3", "cfg"),
    }
    assert inputs["prompt"].default == "good things"
    assert inputs["prompt"].type == "text"
    assert (inputs["seed"].random, inputs["seed"].default) == (True, None)
    assert (inputs["seed"].minimum, inputs["seed"].maximum) == (0, 2**64 - 1)


def test_prompts_are_followed_through_conditioning_and_linked_strings() -> None:
    inputs = found(
        n1=node("PrimitiveStringMultiline", "Wish", value="good"),
        n2=node("StringReplace", string=["1", 0], find="a", replace="b"),
        n3=node("CLIPTextEncode", text=["2", 0]),
        n4=node("CLIPTextEncode", text="bad"),
        n5=node("ConditioningCombine", conditioning_1=["3", 0], conditioning_2=["3", 0]),
        n6=node("ControlNetApplyAdvanced", positive=["5", 0], negative=["4", 0], strength=0.5),
        n7=node("KSamplerAdvanced", noise_seed=3, positive=["6", 0], negative=["6", 1]),
    )
    assert places(inputs) == {
        "prompt": ("1", "value"),
        "negative_prompt": ("4", "text"),
        "strength": ("6", "strength"),
        "seed": ("7", "noise_seed"),
    }


def test_a_guider_has_a_prompt_and_no_negative_one() -> None:
    inputs = found(
        n1=node("CLIPTextEncodeFlux", clip_l="a", t5xxl="b", guidance=3.5),
        n2=node("BasicGuider", conditioning=["1", 0]),
        n3=node("RandomNoise", noise_seed=5),
    )
    assert places(inputs) == {
        "prompt": ("1", "clip_l"),
        "prompt_2": ("1", "t5xxl"),
        "seed": ("3", "noise_seed"),
    }


def test_one_text_for_both_sides_is_the_prompt() -> None:
    inputs = found(
        n1=node("CLIPTextEncode", text="x"),
        n2=node("ConditioningZeroOut", conditioning=["1", 0]),
        n3=sampler("1", "2"),
    )
    assert places(inputs)["prompt"] == ("1", "text")
    assert "negative_prompt" not in inputs


def test_texts_that_no_sampler_reaches_are_told_by_their_title() -> None:
    inputs = found(
        n1=node("CLIPTextEncode", "My Negative", text="x"), n2=node("TextEncodeQwenImageEdit", prompt="y")
    )
    assert places(inputs) == {"prompt": ("2", "prompt"), "negative_prompt": ("1", "text")}


@pytest.mark.parametrize(
    "source",
    [
        node("Join", string=["3", 0], text=["3", 0]),  # two ways to go
        node("Random", count=5),
        node("Loop", text=["4", 0]),
    ],
)
def test_a_text_whose_source_is_not_one_string_is_no_input(source: dict[str, Any]) -> None:
    more = {f"n{number}": node("Pass", text=[str(number + 1), 0]) for number in range(4, 70)}
    inputs = found(n1=node("CLIPTextEncode", text=["2", 0]), n2=source, n3=node("X"), **more, n70=node("X"))
    assert inputs == {}


def test_a_second_seed_is_numbered_and_told_apart_by_its_node() -> None:
    inputs = found(n1=node("KSampler", "Base", seed=1), n2=node("KSampler", "Refiner", seed=2, steps=5))
    assert list(inputs) == ["seed", "seed_2", "steps"]
    assert inputs["seed_2"].title == "Seed (Refiner)"
    assert inputs["steps"].title == "Steps"


def test_a_name_made_by_numbering_never_takes_another_inputs_name() -> None:
    inputs = found(
        n1=node("PrimitiveInt", "Seed 2", value=7), n2=node("KSampler", seed=1), n3=node("KSampler", seed=2)
    )
    assert places(inputs) == {"seed_2": ("1", "value"), "seed": ("2", "seed"), "seed_3": ("3", "seed")}


def test_sizes_models_and_files_are_found_with_the_graphs_values() -> None:
    inputs = found(
        n1=node("EmptyLatentImage", width=512, height=768, batch_size=2),
        n2=node("CheckpointLoaderSimple", ckpt_name="a.safetensors"),
        n3=node("LoraLoader", lora_name="l", strength_model=0.8, strength_clip=1.0),
        n4=node("LoadImage", image="a.png"),
        n5=node("LoadImageMask", image="m.png", channel="red"),
        n6=node("LoadAudio", audio="a.wav"),
        n7=node("LoadVideo", file="a.mp4"),
        n8=node("EmptyImage", color=255, width=["1", 0]),
        n9=node("ImageScale", width=0),
    )
    assert {name: (item.type, item.default) for name, item in inputs.items()} == {
        "image": ("image", "a.png"),
        "mask": ("mask", "m.png"),
        "audio": ("audio", "a.wav"),
        "video": ("video", "a.mp4"),
        "width": ("integer", 512),
        "height": ("integer", 768),
        "batch_size": ("integer", 2),
        "checkpoint": ("string", "a.safetensors"),
        "lora": ("string", "l"),
        "lora_strength": ("number", 0.8),
        "color": ("integer", 255),
        "width_2": ("integer", 0),
    }
    assert inputs["width_2"].minimum == 0, "what the graph says is always allowed"
    assert inputs["width"].minimum == 1


def test_a_value_past_the_usual_bounds_widens_them() -> None:
    assert found(n1=node("KSampler", steps=20_000))["steps"].maximum == 20_000


def test_a_file_that_could_not_be_sent_as_a_value_has_to_be_given() -> None:
    inputs = found(n1=node("LoadImage", image="a.png [output]"), n2=node("LoadLatent", latent="x.latent"))
    assert (inputs["image"].required, inputs["image"].default) == (True, None)
    assert (inputs["file"].type, inputs["file"].default) == ("file", "x.latent")


def test_primitives_are_named_by_their_titles() -> None:
    inputs = found(
        n1=node("PrimitiveInt", "Größe des Bildes!", value=5),
        n2=node("PrimitiveFloat", "2. Strength", value=0.5),
        n3=node("PrimitiveBoolean", "图像", value=True),
        n4=node("PrimitiveString", value="x"),
        n5=node("PrimitiveInt", "Main Seed", value=5),
        n6=node("PrimitiveInt", "Linked", value=["1", 0]),
        n7=node("PrimitiveStringMultiline", "Story", value="x\ny"),
        abc=node("PrimitiveFloat", "图像", value=0.5),
    )
    assert {name: (item.type, item.default) for name, item in inputs.items()} == {
        "grosse_des_bildes": ("integer", 5),
        "strength": ("number", 0.5),
        "value_x": ("boolean", True),
        "primitivestring": ("string", "x"),
        "main_seed": ("integer", None),
        "story": ("text", "x\ny"),
        "value_abc": ("number", 0.5),
    }
    assert inputs["main_seed"].random


def test_values_of_another_type_are_left_alone() -> None:
    assert found(n1=node("X", steps="many", cfg=None, seed=-1.5, sampler_name=5, width=["1", 0][:1])) == {}


def test_a_found_template_without_values_runs_the_graph_as_exported() -> None:
    graph = {
        "1": node("CLIPTextEncode", text="x"),
        "2": sampler("1", "1", denoise=0.5, sampler_name="euler", scheduler="normal"),
    }
    made = parse_template("t", json.dumps(graph).encode(), None)
    rendered = render(made, {}, random.Random(1))
    seed = rendered.graph["2"]["inputs"].pop("seed")
    assert seed == rendered.inputs["seed"]
    assert rendered.graph["2"]["inputs"] == {
        name: value for name, value in graph["2"]["inputs"].items() if name != "seed"
    }
    assert "[inputs.prompt]" in template_toml(made)
