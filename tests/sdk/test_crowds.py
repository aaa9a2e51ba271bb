"""Many jobs at once through the official SDK: each has its own result, and none is lost."""

import asyncio
import io
from collections import Counter

from comfy_sdk import AsyncComfy, Workflow
from PIL import Image

from tests.conformance import graphs
from tests.sdk.stage import PATIENCE

JOBS = 200


async def test_two_hundred_jobs_in_parallel_have_each_its_own_result(async_client: AsyncComfy) -> None:
    async def one(color: int) -> tuple[str, bool]:
        graph = graphs.picture()
        graph["1"]["inputs"]["color"] = color
        job = await async_client.submit(Workflow(graph), metadata={"crowd": f"{color:06x}"})
        await job.wait(PATIENCE)
        (output,) = job.outputs
        data = await output.to_bytes()
        with Image.open(io.BytesIO(data)) as image:
            painted = image.convert("RGB").getpixel((0, 0))
        expected = (color >> 16 & 255, color >> 8 & 255, color & 255)
        return job.status, painted == expected and len(data) == output.size_bytes

    first = graphs.color() & 0xFFFF00
    async with asyncio.timeout(PATIENCE):
        results = await asyncio.gather(*(one(first + number) for number in range(JOBS)))
    assert Counter(results) == {("succeeded", True): JOBS}
    mine = {f"{first + number:06x}" for number in range(JOBS)}
    found = [item.metadata["crowd"] async for item in async_client.list_jobs() if "crowd" in item.metadata]
    assert sorted(mine & set(found)) == sorted(mine)
    assert len(found) == len(set(found))
