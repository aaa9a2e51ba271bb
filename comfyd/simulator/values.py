"""What flows between simulated nodes: pictures, latents, texts and sounds, as small immutable values.

Their `repr` is what an `execution_error` shows under `current_inputs`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, slots=True, repr=False)
class Images:
    """An IMAGE batch: pictures of one size, mode RGB; never changed in place."""

    frames: tuple[Image, ...]

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.frames[0].size

    @property
    def pixels(self) -> int:
        """Pixels of all frames together: the measure of how long work on them takes."""
        width, height = self.size
        return width * height * len(self.frames)

    def __repr__(self) -> str:
        width, height = self.size
        return f"tensor(shape=[{len(self.frames)}, {height}, {width}, 3])"


@dataclass(frozen=True, slots=True, repr=False)
class Mask:
    """A MASK: one greyscale picture, mode L."""

    picture: Image

    def __repr__(self) -> str:
        width, height = self.picture.size
        return f"tensor(shape=[1, {height}, {width}])"


@dataclass(frozen=True, slots=True)
class Conditioning:
    """A CONDITIONING: the text it was made from."""

    text: str


@dataclass(frozen=True, slots=True)
class Model:
    """A MODEL, CLIP or CLIP_VISION: the file it came from."""

    name: str


@dataclass(frozen=True, slots=True)
class Vae:
    """A VAE: the file it came from, and how many pixels a latent cell spans."""

    name: str
    cell: int = 8


@dataclass(frozen=True, slots=True)
class Painting:
    """What a sampler was asked to paint; drawn when it is decoded."""

    text: str
    seed: int
    steps: int
    width: int
    height: int
    strength: float = 1.0
    source: tuple[Image, ...] = field(default=(), repr=False)


@dataclass(frozen=True, slots=True)
class Latent:
    """A LATENT: its size in cells, and what will be seen when it is decoded."""

    width: int
    height: int
    batch: int
    channels: int = 4
    cell: int = 8
    frames: tuple[Image, ...] = field(default=(), repr=False)
    painting: Painting | None = None


@dataclass(frozen=True, slots=True)
class Video:
    """A VIDEO: frames and their rate."""

    images: Images
    frames_per_second: float


@dataclass(frozen=True, slots=True)
class Audio:
    """An AUDIO: the notes of a square wave (Hz; 0 is silence), each equally long."""

    notes: tuple[int, ...]
    seconds: float
    sample_rate: int = 44100
    channels: int = 2


@dataclass(frozen=True, slots=True)
class Solid:
    """A VOXEL or MESH: a box, drawn as one cube."""

    size: float
