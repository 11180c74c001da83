"""The storage quota of each owner. It limits the sum of the stored bytes and the bytes reserved by running uploads."""

from __future__ import annotations

from corral import clock
from corral.errors import Problem, Unavailable
from corral.plugin import Settings
from corral_plugins.files.models import Upload, Usage
from corral_plugins.files.settings import USER_QUOTA_BYTES
from corral_plugins.files.shapes import FileUsage

ABANDONED_SECONDS = 3600.0  # an upload that was not renewed for this long has ended without saying so


class FileQuota:
    """Tracks the storage usage of each owner. All methods run in the caller's unit of work.

    A single conditional update checks the quota and reserves the bytes, so parallel uploads cannot exceed the quota
    together. To avoid deadlocks, every method changes the upload's row before the owner's row.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def begin(self, upload_id: str, owner_id: str, size: int) -> None:
        """Reserve bytes for a new upload. Raise a problem (`quota_exceeded`) if the owner's quota would be exceeded."""
        Usage.insert(owner_id=owner_id).on_conflict_ignore().execute()
        Upload.create(id=upload_id, owner_id=owner_id, reserved=0, renewed_at=clock.now())
        self.grow(upload_id, owner_id, size)

    def grow(self, upload_id: str, owner_id: str, more: int) -> None:
        """Reserve more bytes for an upload, and record that the upload is still running.

        Raise a problem (`quota_exceeded`) if the owner's quota would be exceeded, or `Unavailable` if the upload was
        declared abandoned.
        """
        renewed = Upload.update(reserved=Upload.reserved + more, renewed_at=clock.now())
        if not renewed.where(Upload.id == upload_id).execute():
            raise _interrupted_error()
        quota = self._settings.get(USER_QUOTA_BYTES)
        reserve = Usage.update(reserved=Usage.reserved + more).where(Usage.owner_id == owner_id)
        if quota is not None:
            reserve = reserve.where(Usage.bytes + Usage.reserved + more <= quota)
        changed = reserve.execute()
        if more and not changed:
            detail = f"Your files may take at most {quota} bytes; delete files, or ask an admin to raise the quota."
            raise Problem(detail, code="quota_exceeded")

    def commit(self, upload_id: str, owner_id: str, size: int) -> None:
        """Replace the upload's reservation with the size of the stored file.

        Raise `Unavailable` if the upload was declared abandoned in the meantime, because its bytes are then deleted.
        """
        if not self.end(upload_id):
            raise _interrupted_error()
        counted = {Usage.files: Usage.files + 1, Usage.bytes: Usage.bytes + size}
        Usage.update(counted).where(Usage.owner_id == owner_id).execute()

    def end(self, upload_id: str) -> bool:
        """Release the bytes reserved by an upload. Return False if they had already been released."""
        ended: list[Upload] = list(Upload.delete().where(Upload.id == upload_id).returning(Upload).execute())
        if not ended:
            return False
        (upload,) = ended
        reserved = {Usage.reserved: Usage.reserved - upload.reserved}
        Usage.update(reserved).where(Usage.owner_id == upload.owner_id).execute()
        return True

    def subtract_file(self, owner_id: str, size: int) -> None:
        """Subtract a deleted file from its owner's usage."""
        counted = {Usage.files: Usage.files - 1, Usage.bytes: Usage.bytes - size}
        Usage.update(counted).where(Usage.owner_id == owner_id).execute()

    def end_abandoned(self, limit: int) -> int:
        """Release the bytes reserved by at most `limit` abandoned uploads.

        Return the number of these uploads.
        """
        found = Upload.select(Upload.id).where(Upload.renewed_at < clock.now(-ABANDONED_SECONDS)).limit(limit)
        return sum(self.end(upload.id) for upload in list(found))

    def usage(self, owner_id: str) -> FileUsage:
        """Return the number and total size of an owner's files, and the quota."""
        row = Usage.get_or_none(Usage.owner_id == owner_id)
        return FileUsage(
            files=row.files if row is not None else 0,
            bytes=row.bytes if row is not None else 0,
            quota_bytes=self._settings.get(USER_QUOTA_BYTES),
        )


def _interrupted_error() -> Unavailable:
    return Unavailable("The upload was interrupted for too long; send the file again.")
