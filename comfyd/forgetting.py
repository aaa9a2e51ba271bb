"""Files that no row names any more are deleted; never decides which."""

from collections.abc import Sequence

import structlog

from comfyd.errors import ComfydError
from comfyd.storage.opening import Storages
from comfyd.store.base import Store
from comfyd.tasks import Artefact
from comfyd.uploads import Uploads

log = structlog.get_logger("comfyd.forgetting")


class Forgetter:
    """Deletes the files of tasks. Lives as long as the process.

    One that stays is logged and does not hold up what was decided.
    """

    def __init__(self, store: Store, storages: Storages, uploads: Uploads) -> None:
        self._store = store
        self._storages = storages
        self._uploads = uploads

    async def outputs(self, artefacts: Sequence[Artefact]) -> None:
        """Delete artefacts."""
        await self._storages.delete([(artefact.storage, artefact.key) for artefact in artefacts])

    async def uploads(self, files: Sequence[str]) -> None:
        """Delete those of these uploads that no task names."""
        try:
            await self._uploads.forget(files, self._store.unused_uploads)
        except ComfydError as exc:
            log.warning("upload.left", files=files, reason=exc.message)
