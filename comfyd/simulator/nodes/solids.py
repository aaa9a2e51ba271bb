"""Nodes that make and save three-dimensional things: all of them a cube."""

from __future__ import annotations

from comfyd.simulator import containers
from comfyd.simulator.nodes.base import Inputs, NodeContext, Result, node
from comfyd.simulator.nodes.savers import save_one
from comfyd.simulator.values import Latent, Solid


@node("EmptyLatentHunyuan3Dv2")
async def empty_latent(_context: NodeContext, inputs: Inputs) -> Result:
    """An empty latent of a shape."""
    return Result((Latent(inputs["resolution"], 1, inputs["batch_size"], channels=64, cell=1),))


@node("VAEDecodeHunyuan3D")
async def decode(_context: NodeContext, _inputs: Inputs) -> Result:
    """A box of voxels."""
    return Result((Solid(2.0),))


@node("VoxelToMesh", "VoxelToMeshBasic")
async def to_mesh(_context: NodeContext, inputs: Inputs) -> Result:
    """The same box as a mesh; a higher threshold makes it smaller."""
    return Result((Solid(inputs["voxel"].size * (1.5 - inputs["threshold"] / 2)),))


@node("SaveGLB")
async def save_glb(context: NodeContext, inputs: Inputs) -> Result:
    """A binary glTF file."""
    place = context.folders.save_place(inputs["filename_prefix"], "output")
    return Result((), {"3d": [save_one(context, place, ".glb", containers.glb(inputs["mesh"].size))]})
