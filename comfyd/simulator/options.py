"""What a simulated ComfyUI is set up with: one frozen value, and the two flavors it can play.

A flavor names behaviour, never a version comparison in the code that uses it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

FlavorName = Literal["0.3.75", "0.33"]

LORAS: Final = ("add-detail.safetensors",)
CHECKPOINTS: Final = ("v1-5-pruned-emaonly-fp16.safetensors", "sd_xl_base_1.0.safetensors")


@dataclass(frozen=True, kw_only=True)
class Flavor:
    """Behaviour in which ComfyUI 0.33.0 differs from 0.3.75; every field is False for 0.3.75."""

    version: str
    canonical_prompt_ids: bool  # `prompt_id` must be a lowercase hyphenated UUID; null mints one
    detailed_graph_errors: bool  # `missing_node_type`, `dependency_cycle`
    new_combos_checked: bool  # ["COMBO", {...}] inputs are validated
    graph_walked_early: bool  # malformed stray nodes are 500 at POST instead of a dead worker
    inputs_confined: bool  # LoadImage refuses paths outside its folder
    jobs_api: bool  # /api/jobs, /api/assets, /node_replacements
    progress_throttled: bool  # at most one progress message per 100 ms and bar
    cached_outputs_always: bool  # a fully cached run without client_id still names its outputs
    cross_site_refused: bool  # Sec-Fetch-Site: cross-site is 403
    hardened_view: bool  # nosniff, attachment for active content


FLAVORS: Final[dict[FlavorName, Flavor]] = {
    "0.3.75": Flavor(
        version="0.3.75",
        canonical_prompt_ids=False,
        detailed_graph_errors=False,
        new_combos_checked=False,
        graph_walked_early=False,
        inputs_confined=False,
        jobs_api=False,
        progress_throttled=False,
        cached_outputs_always=False,
        cross_site_refused=False,
        hardened_view=False,
    ),
    "0.33": Flavor(
        version="0.33.0",
        canonical_prompt_ids=True,
        detailed_graph_errors=True,
        new_combos_checked=True,
        graph_walked_early=True,
        inputs_confined=True,
        jobs_api=True,
        progress_throttled=True,
        cached_outputs_always=True,
        cross_site_refused=True,
        hardened_view=True,
    ),
}


@dataclass(frozen=True, kw_only=True)
class SimulatorOptions:
    """How one simulated server runs.

    `directory` holds `input`, `output` and `temp` (None: a temporary one that is removed at the end).
    `node_seconds` is the least time each executed node takes, `step_seconds` the time of one sampler or tile
    step. `output_bytes` pads every saved PNG to at least that size (None: off).
    """

    host: str = "127.0.0.1"
    port: int = 0
    directory: Path | None = None
    flavor: FlavorName = "0.3.75"
    node_seconds: float = 0.0
    step_seconds: float = 0.0
    execution_log: Path | None = None
    output_bytes: int | None = None
    checkpoints: tuple[str, ...] = CHECKPOINTS
    loras: tuple[str, ...] = LORAS
    previews: bool = True
    max_upload_bytes: int = 100 * 1024 * 1024
    max_history: int = 10_000

    @property
    def behaviour(self) -> Flavor:
        """The flavor as the set of behaviours it names."""
        return FLAVORS[self.flavor]
