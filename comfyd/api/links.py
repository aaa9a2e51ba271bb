"""Where the outputs of tasks can be fetched: from their storage, or from comfyd itself; never fetches one."""

import asyncio
import base64
from collections.abc import Sequence
from urllib.parse import quote

from comfyd.api.schemas import OutputView
from comfyd.api.views import output_view
from comfyd.errors import ComfydError
from comfyd.signing import Signer
from comfyd.storage.opening import Storages
from comfyd.tasks import Artefact


class Links:
    """Makes the urls of artefacts. Lives as long as the process."""

    def __init__(self, storages: Storages, signer: Signer) -> None:
        self._storages = storages
        self._signer = signer

    async def outputs(
        self, artefacts: Sequence[Artefact], base: str, *, data: bool = True
    ) -> tuple[OutputView, ...]:
        """The artefacts as clients see them, with small files whole (`data`) or not.

        `base` is the url that comfyd is reached under.
        """
        return tuple(
            await asyncio.gather(*(self.output(artefact, base, data=data) for artefact in artefacts))
        )

    async def output(self, artefact: Artefact, base: str, *, data: bool = True) -> OutputView:
        """One of them."""
        url = await self._elsewhere(artefact)
        if url is None:
            path = served_path(artefact)
            url = f"{base}/api/files/{quote(path)}{self._signer.query(path)}"
        shown = None
        if data and artefact.data is not None:
            shown = base64.b64encode(artefact.data).decode()
        return output_view(artefact, url, shown)

    async def _elsewhere(self, artefact: Artefact) -> str | None:
        """The storage's own url; None where comfyd serves the file, if only to say why it cannot."""
        try:
            storage = await self._storages.get(artefact.storage)
            return await storage.url(artefact.key, artefact.location)
        except ComfydError:
            return None

    def check(self, path: str, expires: str | None, signature: str | None) -> None:
        """Raise `InvalidSignature` where this path may not be served."""
        self._signer.check(path, expires, signature)


def served_path(artefact: Artefact) -> str:
    """What stands for the artefact after `/api/files/`: `task/attempt/file`, without the client's folders."""
    return "/".join(artefact.key.split("/")[-3:])
