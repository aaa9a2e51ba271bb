"""What one ComfyUI can run, remembered until it may have changed; never judges a graph."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Generic, TypeVar

from comfyd.comfy.client import Client, read_object
from comfyd.comfy.health import Health
from comfyd.errors import BackendError

T = TypeVar("T")


class Remembered(Generic[T]):
    """One answer of a server, fetched by one caller at a time and shared. Lives as long as the backend.

    Whoever waited while another fetched gets that one's answer, or its error.
    """

    def __init__(self, fetch: Callable[[], Awaitable[T]], health: Health) -> None:
        self._fetch = fetch
        self._health = health
        self._turn = asyncio.Lock()
        self._answer: T | None = None
        self._error: BackendError | None = None
        self._tries = 0
        self._life = health.life

    async def get(self, refresh: bool = False) -> T:
        """The answer; `refresh` asks the server even if there is one. Raises what the fetching raised."""
        if self._answer is not None and not refresh and self._life == self._health.life:
            return self._answer
        tries = self._tries
        async with self._turn:
            tried = self._tries != tries  # by another, while this one waited
            if tried and self._error is not None:
                raise type(self._error)(self._error.message, details=self._error.details)
            if tried and self._answer is not None:
                return self._answer
            return await self._try()

    async def _try(self) -> T:
        life = self._health.life
        try:
            answer = await self._fetch()
        except BackendError as error:
            self._error = error
            self._tries += 1
            raise
        # of a server that went away meanwhile: good for those who asked then, stale for the next
        self._answer, self._error, self._life = answer, None, life
        self._tries += 1
        return answer


class Catalogue:
    """The node classes of one ComfyUI. Lives as long as the backend."""

    def __init__(self, client: Client, health: Health) -> None:
        self._client = client
        self.classes: Remembered[dict[str, Any]] = Remembered(self._object_info, health)
        self.replaceable: Remembered[frozenset[str]] = Remembered(self._replacements, health)

    async def _object_info(self) -> dict[str, Any]:
        return await self._client.get_object("/object_info")

    async def _replacements(self) -> frozenset[str]:
        answer = await self._client.call("GET", "/node_replacements")
        if answer.status in {404, 405}:
            return frozenset()  # older than the route
        return frozenset(read_object(answer, "GET /node_replacements"))
