"""Files that no row names any more are deleted; never decides which."""

from collections.abc import Sequence

import structlog

from comfyd.errors import ComfydError, StoreError
from comfyd.storage.opening import Storages
from comfyd.store.base import Store
from comfyd.tasks import Artefact
from comfyd.uploads import Uploads

log = structlog.get_logger("comfyd.forgetting")


class Forgetter:
    """Deletes the files of tasks. Lives as long as the process.

    One that stays is logged, kept in mind by the store, and does not hold up what was decided.
    """

    def __init__(self, store: Store, storages: Storages, uploads: Uploads) -> None:
        self._store = store
        self._storages = storages
        self._uploads = uploads

    async def outputs(self, artefacts: Sequence[Artefact]) -> None:
        """Delete artefacts whose rows are gone. What a storage does not delete now is tried again."""
        await self._delete([(artefact.storage, artefact.key) for artefact in artefacts])

    async def leftovers(self, limit: int) -> int:
        """Try again to delete what earlier tries left; how many files went."""
        return await self._delete(await self._store.unwanted_files(limit))

    async def _delete(self, files: Sequence[tuple[str, str]]) -> int:
        gone = await self._storages.delete(files)
        if gone:
            try:
                await self._store.files_gone(gone)
            except StoreError as exc:  # they are deleted once more, then
                log.warning("files_gone.unsaid", reason=exc.message)
        return len(gone)

    async def uploads(self, files: Sequence[str]) -> None:
        """Delete those of these uploads that no task names."""
        try:
            await self._uploads.forget(files, self._store.unused_uploads)
        except ComfydError as exc:
            log.warning("upload.left", files=files, reason=exc.message)
