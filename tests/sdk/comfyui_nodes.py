"""Nodes for the real ComfyUI, which loads this file: they do what its own do with a checkpoint or a purse."""

import hashlib
import time
from typing import Any

from comfy.utils import ProgressBar  # type: ignore[import-not-found]  # only ComfyUI's own process has it
from PIL import Image


class SketchingSteps:
    """Takes steps and sends a preview with each, as samplers do."""

    CATEGORY = "tests"
    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - ComfyUI's name
        """What it takes."""
        return {
            "required": {
                "image": ("IMAGE",),
                "steps": ("INT", {"default": 10, "min": 1, "max": 1000}),
                "seconds": ("FLOAT", {"default": 0.05, "min": 0.0, "max": 10.0}),
            }
        }

    def run(self, image: Any, steps: int, seconds: float) -> tuple[Any]:
        """The picture as it was."""
        progress = ProgressBar(steps)
        for step in range(steps):
            time.sleep(seconds)
            sketch = Image.new("RGB", (64, 48), (step * 255 // steps, 0, 128))
            progress.update_absolute(step + 1, steps, ("JPEG", sketch, 512))
        return (image,)


class KeyDigest:
    """Shows the SHA-256 of the key that came with the prompt, as partner nodes get it."""

    CATEGORY = "tests"
    RETURN_TYPES = ()
    FUNCTION = "run"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - ComfyUI's name
        """What it takes."""
        return {
            "required": {"salt": ("STRING", {"default": ""})},
            "hidden": {"api_key": "API_KEY_COMFY_ORG"},
        }

    def run(self, salt: str, api_key: str | None = None) -> dict[str, Any]:
        """Digest of salt and key."""
        return {"ui": {"text": [hashlib.sha256(f"{salt}{api_key}".encode()).hexdigest()]}}


NODE_CLASS_MAPPINGS = {"SketchingSteps": SketchingSteps, "KeyDigest": KeyDigest}
