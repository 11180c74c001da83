"""The database rows for files, and the rules about who may read and change files.

Only this module and the module `uploads` write to the table.
"""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from corral import clock
from corral.auth.principal import Principal, require_owner
from corral.auth.visibility import NO_ROWS, visible
from corral.database.dialect import advisory_lock
from corral.database.model import PRIVATE, SHARED
from corral.database.statement import Statement
from corral.database.unit import locked
from corral.errors import Conflict, Invalid, NotFound
from corral.events.event import emit
from corral.http.answers import IfMatch
from corral.http.page import Page, newest_first, paginate
from corral.plugin import Audit, AuditEntry
from corral_plugins.files.api import FileDeleted, FileFacts, FileSource, FileUpdated, FileUploaded
from corral_plugins.files.models import File
from corral_plugins.files.service.display_names import clean_name
from corral_plugins.files.service.media_type_detection import MARKUP, TEXT, UNKNOWN
from corral_plugins.files.service.quota import FileQuota
from corral_plugins.files.shapes import FilePatch, FileQuery, FileView
from corral_plugins.tasks.api import Tasks

KEY_SECONDS = 24 * 3600.0
MAX_MADE = 100  # as many artifacts as a run may report
TASK_READ = "tasks.read"
_FIRST_OF_TASK = Statement(lambda p: File.select(File.id).where(File.task_id == p("task_id")).limit(1).tuples())


class FileRegistry:
    """Reads and changes the database rows for files. All methods run in the caller's unit of work."""

    tasks: Tasks | None = None
    audit: Audit | None = None

    def __init__(self, quota: FileQuota) -> None:
        self._quota = quota

    # -- reading

    def readable(self, caller: Principal) -> Any:
        """Return an SQL condition that selects the files that the caller may read.

        The caller may read their own files, files that are shared with a task that the caller may read, and files of
        the task whose lease the caller holds.
        """
        is_shared = (File.shared_with == "task") & File.task_id.is_null(False)
        through_tasks = self.tasks is not None and caller.role != "auditor" and caller.may(TASK_READ)
        condition = visible(File, caller) | (is_shared if through_tasks else NO_ROWS)
        if caller.task_id is not None:
            condition = condition | (File.task_id == caller.task_id)
        return condition & is_current()

    def find(self, file_id: str, caller: Principal) -> File:
        """Return a file. Raise `NotFound` if the file does not exist or the caller may not read it."""
        row: File | None = File.get_or_none((File.id == file_id) & self.readable(caller))
        if row is None:
            raise NotFound()
        return row

    def find_any(self, file_id: str) -> File | None:
        """Return a file without checking permissions, or None if it does not exist."""
        row: File | None = File.get_or_none((File.id == file_id) & is_current())
        return row

    def list_files(self, query: FileQuery, caller: Principal) -> Page[FileView]:
        """Return the files that the caller may read, newest first."""
        rows = File.select().where(self.readable(caller))
        if isinstance(query.task_id, str):
            rows = rows.where(File.task_id == query.task_id.lower())
        if isinstance(query.source, str):
            rows = rows.where(File.source_type == query.source)
        if isinstance(query.search, str):
            rows = rows.where(File.name.contains(query.search))
        return paginate(rows, query, caller, scope="files", order=newest_first(File), make=view_of)

    def made_for_task(self, task_id: str) -> list[File]:
        """Return the files that workers and agents created for a task, oldest first, up to a maximum number."""
        if _FIRST_OF_TASK.one({"task_id": task_id}) is None:  # as for most tasks
            return []
        made = (File.task_id == task_id) & File.source_type.in_(("worker", "agent")) & is_current()
        return list(File.select().where(made).order_by(File.created_at, File.id).limit(MAX_MADE))

    # -- changing

    def update(self, file_id: str, patch: FilePatch, match: IfMatch, caller: Principal) -> FileView:
        """Change a file. Absent fields stay unchanged.

        Raise `Invalid` if the new task does not exist, the expiry time is not in the future, or the visibility is
        `task` although the file belongs to no task.
        """
        row = self._find_own(file_id, match, caller)
        changes: dict[str, Any] = {}
        if isinstance(patch.name, str):
            changes["name"] = clean_name(patch.name)
        if patch.task_id is not UNSET:
            changes["task_id"] = self.require_task(patch.task_id, "/task_id")
        if patch.expires_at is not UNSET:
            changes["expires_at"] = future_instant(patch.expires_at, "/expires_at")
        if isinstance(patch.visibility, str):
            changes["shared_with"] = patch.visibility
        if changes.get("task_id", row.task_id) is None:
            if patch.visibility == "task":
                raise Invalid.at("/visibility", "not_allowed", "The file does not belong to a task; set task_id too.")
            changes["shared_with"] = "private"
        if any(getattr(row, name) != value for name, value in changes.items()):
            row = self._change(row, changes)
            self._emit(FileUpdated, row)
        return view_of(row)

    def delete(self, file_id: str, match: IfMatch, caller: Principal) -> str:
        """Delete the row of a file. Return the storage key of its bytes, which the caller must then delete.

        Raise `Conflict` (`in_use`) while a run holds the lease of the file's task, because the run may be reading the
        file.
        """
        row = self._find_own(file_id, match, caller)
        run = self.tasks.find_run(row.task_id) if self.tasks is not None and row.task_id is not None else None
        if run is not None and run.lease_id:
            detail = "A run of the file's task may be reading the file; delete it after the run, or cancel the task."
            raise Conflict(detail, code="in_use", references=[{"type": "task", "id": run.task_id}])
        if not self.remove(row):
            raise NotFound()
        return str(row.key)

    def remove(self, row: File) -> bool:
        """Delete the row of a file. Return False if another unit of work has already deleted it."""
        if not File.delete().where(File.id == row.id).execute():
            return False
        self._quota.subtract_file(row.owner_id, row.size_bytes)
        self._emit(FileDeleted, row)
        return True

    def leave_task(self, task_id: str, limit: int) -> int:
        """Detach at most `limit` files from a deleted task, which makes them private.

        Return the number of these files.
        """
        rows = list(File.select().where(File.task_id == task_id).limit(limit))
        for row in rows:
            self._emit(FileUpdated, self._change(row, {"task_id": None, "shared_with": "private"}))
        return len(rows)

    def private_files(self, owner_id: str, limit: int) -> list[File]:
        """Lock and return at most `limit` files of an owner that are not shared with a task."""
        rows = File.select().where((File.owner_id == owner_id) & ~is_shared_row()).order_by(File.created_at, File.id)
        return list(locked(rows.limit(limit)))

    def expired(self, limit: int) -> list[File]:
        """Lock and return at most `limit` expired files."""
        rows = File.select().where(File.expires_at.is_null(False) & (File.expires_at <= clock.now()))
        return list(locked(rows.order_by(File.expires_at, File.id).limit(limit)))

    # -- uploads

    def earlier_upload(self, upload_key: str | None, *, sha256: str, name: str) -> File | None:
        """Return the file that an earlier upload with the same idempotency key created.

        Return None if there was no such upload. Raise `Invalid` (`idempotency_key_reused`) if the earlier upload had
        different content or a different name.
        """
        if upload_key is None:
            return None
        advisory_lock(f"files.upload:{upload_key}")
        row: File | None = File.get_or_none(File.upload_key == upload_key)
        if row is None:
            return None
        if row.created_at <= clock.now(-KEY_SECONDS):
            File.update(upload_key=None).where(File.id == row.id).execute()
            return None
        if (row.sha256, row.name) != (sha256, name):
            detail = "This key was used with another file; choose a new key."
            where = "/header/Idempotency-Key"
            raise Invalid.at(where, "not_unique", detail, problem="idempotency_key_reused")
        return row

    def attempt_of_lease(self, task_id: str, lease_id: str) -> str:
        """Return the id of the attempt that holds a lease.

        Raise `Conflict` (`lease_lost`) if the lease has ended.
        """
        attempt = None if self.tasks is None else self.tasks.live_attempt(task_id, lease_id)
        if attempt is None:
            raise lease_lost_error()
        return attempt.attempt_id

    def require_task(self, task_id: str | UnsetType | None, pointer: str) -> str | None:
        """Return the normalized id of a task, or None if no task is given.

        Raise `Invalid` (`unknown_reference`) if the task does not exist. The task is locked, so that a concurrent
        deletion of the task waits until the file's row exists, and then also finds that row.
        """
        if not isinstance(task_id, str):
            return None
        if self.tasks is None or not self.tasks.lock(task_id.lower()):
            detail = "There is no task with this id."
            raise Invalid.at(pointer, "unknown_reference", detail, problem="unknown_reference")
        return task_id.lower()

    def emit_uploaded(self, row: File, cause: tuple[str, ...]) -> None:
        """Emit a `FileUploaded` event.

        The event stores the ids of the triggers and tasks that led to it: those that led to the run's task if a run
        uploaded the file, otherwise `cause`.
        """
        if row.source_type in ("worker", "agent") and row.task_id is not None and self.tasks is not None:
            run = self.tasks.find_run(row.task_id)
            cause = run.cause_chain if run is not None else ()
        self._emit(FileUploaded, row, cause or None)

    def record_link(self, row: File) -> None:
        """Record in the audit log that a download link was created."""
        if self.audit is not None:
            entry = AuditEntry(action="files.link.create", object_type="file", object_id=row.id, object_name=row.name)
            self.audit.record(entry)

    def _find_own(self, file_id: str, match: IfMatch, caller: Principal) -> File:
        locked(File.select(File.id).where(File.id == file_id)).first()  # keeps the version as it is
        row = self.find(file_id, caller)
        require_owner(caller, row.owner_id, what="file")
        match.check(row.version)
        return row

    def _change(self, row: File, changes: dict[str, Any]) -> File:
        changed = File.update(**changes, updated_at=clock.now(), version=File.version + 1)
        if not changed.where((File.id == row.id) & (File.version == row.version)).execute():
            raise Conflict(
                "The file was changed by another request at the same time; fetch it again and repeat the change."
            )
        found: File = File.get_by_id(row.id)
        return found

    @staticmethod
    def _emit(kind: Any, row: File, cause: tuple[str, ...] | None = None) -> None:
        """Emit an event that is visible to the users who may currently read the file."""
        event = kind(
            file_id=row.id,
            name=row.name,
            size_bytes=row.size_bytes,
            detected_type=row.detected_type,
            task_id=row.task_id,
            owner_id=row.owner_id,
        )
        visibility = SHARED if is_shared(row) else PRIVATE
        emit(event, object=("file", str(row.id)), owner=str(row.owner_id), visibility=visibility, cause=cause)


def is_current() -> Any:
    """Return an SQL condition that selects files that have not expired."""
    return File.expires_at.is_null() | (File.expires_at > clock.now())


def is_shared_row() -> Any:
    """Return an SQL condition that selects files that are shared with their task."""
    return (File.shared_with == "task") & File.task_id.is_null(False)


def is_shared(row: File) -> bool:
    """Return whether a file is shared with its task."""
    return row.shared_with == "task" and row.task_id is not None


def lease_lost_error() -> Conflict:
    """Return the error for an upload by a run whose lease has ended."""
    detail = "Workers and agents can upload files only for a task whose lease they hold; this lease has ended."
    return Conflict(detail, code="lease_lost")


def future_instant(moment: Any, pointer: str) -> str | None:
    """Return an expiry time as an instant. Raise `Invalid` if the time is not in the future."""
    if moment is None or moment is UNSET:
        return None
    instant = clock.from_datetime(moment)
    if instant <= clock.now():
        raise Invalid.at(pointer, "in_the_past", "The file would expire immediately; choose a time in the future.")
    return instant


def source_of(row: File) -> FileSource:
    """Return the origin of a file."""
    return msgspec.convert(row.source, FileSource)


def facts_of(row: File) -> FileFacts:
    """Return the facts about a file."""
    return FileFacts(
        id=str(row.id),
        name=str(row.name),
        size_bytes=int(row.size_bytes),
        sha256=str(row.sha256),
        detected_type=str(row.detected_type),
        owner_id=str(row.owner_id),
        task_id=row.task_id,
        source=source_of(row),
    )


def view_of(row: Any) -> FileView:
    """Return a file in the form that API responses contain."""
    return FileView(
        id=row.id,
        name=row.name,
        size_bytes=row.size_bytes,
        sha256=row.sha256,
        content_type=row.content_type,
        detected_type=row.detected_type,
        type_mismatch=types_differ(row.content_type, row.detected_type),
        task_id=row.task_id,
        visibility=row.shared_with,
        owner_id=row.owner_id,
        source=source_of(row),
        expires_at=row.expires_at,
        created_at=row.created_at,
        updated_at=row.updated_at,
        version=row.version,
    )


def types_differ(said: str | None, detected: str) -> bool:
    """Return whether the media type that the client declared contradicts the type of the content.

    The type `application/octet-stream`, whether declared or detected, never contradicts another type. Declared text
    formats such as CSV and JSON do not contradict the detected type of plain text.
    """
    media = (said or UNKNOWN).partition(";")[0].strip().lower()
    if UNKNOWN in (media, detected) or media == detected:
        return False
    if detected == TEXT:
        return not (media.startswith("text/") or media.endswith(("json", "xml", "yaml", "javascript", "x-sh", "sql")))
    if detected in MARKUP:
        return not (media in MARKUP or media.endswith("+xml"))
    return not (detected == "application/zip" and ("zip" in media or "openxml" in media or "opendocument" in media))
