"""What every test of comfyd shares: the option for the real ComfyUI, and patience with slow machines."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

from tests.support.comfyui_option import pytest_addoption, pytest_collection_modifyitems

__all__ = ["pytest_addoption", "pytest_collection_modifyitems"]

settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")
