"""What every test of comfyd shares: the option that asks for the real ComfyUI."""

from __future__ import annotations

from tests.support.comfyui_option import pytest_addoption, pytest_collection_modifyitems

__all__ = ["pytest_addoption", "pytest_collection_modifyitems"]
