"""Where the outputs of tasks can be fetched: from their storage, or from comfyd itself; never fetches one."""

import asyncio
import base64
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Final
from urllib.parse import parse_qsl, quote, urlsplit

import msgspec

from comfyd.api.schemas import OutputView
from comfyd.api.views import output_view
from comfyd.errors import ComfydError
from comfyd.signing import Signer
from comfyd.storage.opening import Storages
from comfyd.tasks import Artefact

_STAMPED: Final = (("X-Amz-Date", "X-Amz-Expires"), ("X-Goog-Date", "X-Goog-Expires"))
"""What signed urls call the moment they were made at, and the seconds that they are good for from then on."""
_STAMP: Final = re.compile(r"\d{8}T\d{6}Z", re.ASCII)
_SECONDS: Final = re.compile(r"\d{1,12}", re.ASCII)


class Link(msgspec.Struct, frozen=True, kw_only=True):
    """An absolute url, and until when it is good in UTC milliseconds; None for as long as there is a file."""

    url: str
    expires_at: int | None = None


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
        link = await self.link(artefact, base)
        shown = None
        if data and artefact.data is not None:
            shown = base64.b64encode(artefact.data).decode()
        return output_view(artefact, link.url, shown)

    async def link(self, artefact: Artefact, base: str) -> Link:
        """Where to fetch it, and for how long."""
        url = await self.elsewhere(artefact)
        if url is None:
            path = served_path(artefact)
            url = f"{base}/api/files/{quote(path)}{self._signer.query(path)}"
        return _link(url)

    async def elsewhere(self, artefact: Artefact) -> str | None:
        """The storage's own url; None where comfyd serves the file, if only to say why it cannot."""
        try:
            storage = await self._storages.get(artefact.storage)
            return await storage.url(artefact.key, artefact.location)
        except ComfydError:
            return None

    def own(self, path: str, base: str) -> Link:
        """A path that comfyd serves itself, signed where urls of files are."""
        return _link(f"{base}{quote(path)}{self._signer.query(path)}")

    def check(self, path: str, expires: str | None, signature: str | None) -> None:
        """Raise `InvalidSignature` where this path may not be served."""
        self._signer.check(path, expires, signature)


def served_path(artefact: Artefact) -> str:
    """What stands for the artefact after `/api/files/`: `task/attempt/file`, without the client's folders."""
    return "/".join(artefact.key.split("/")[-3:])


def _link(url: str) -> Link:
    return Link(url=url, expires_at=_expires_at(url))


def _expires_at(url: str) -> int | None:
    """What a signed url says itself, whoever signed it; one that says nothing does not expire."""
    said = dict(parse_qsl(urlsplit(url).query))
    for made, lasts in _STAMPED:
        if _STAMP.fullmatch(said.get(made, "")) and _SECONDS.fullmatch(said.get(lasts, "")):
            at = datetime.strptime(said[made], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
            return (round(at.timestamp()) + int(said[lasts])) * 1000
    return _own_expiry(said)


def _own_expiry(said: Mapping[str, str]) -> int | None:
    """What `Signer` writes."""
    expires = said.get("expires", "")
    return int(expires) * 1000 if _SECONDS.fullmatch(expires) and "signature" in said else None
