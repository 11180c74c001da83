"""The public API of the `files` plugin: the `Files` service, data types, events and error codes."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator
from typing import Literal, Protocol

import msgspec

from corral.auth.principal import Principal
from corral.database.model import PRIVATE
from corral.errors import declare_codes
from corral.events.event import Event, SystemAlert

declare_codes(
    {
        "blocked_file_type": (
            415,
            "Files of this type are not accepted",
            "Send another file, or ask an admin to change the setting files.blocked_types.",
        ),
        "invalid_signature": (  # 403 on the routes of files
            401,
            "The signature is missing or wrong",
            "Sign the raw bytes of the request body with the webhook's current secret, and send the current time. For "
            "a link to a file, create a new link.",
        ),
    }
)

FileVisibility = Literal["private", "task"]
SourceType = Literal["user", "worker", "agent", "export", "step"]


class FileSource(msgspec.Struct, frozen=True, kw_only=True):
    """The origin of a file: a person, a worker, an agent, an export, or a workflow step.

    `attempt_id` is the id of the task attempt that created the file, or None if no task created it.
    """

    type: SourceType
    id: str | None = None
    attempt_id: str | None = None


class FileFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The facts about a stored file. `detected_type` is the media type detected from its content."""

    id: str
    name: str
    size_bytes: int
    sha256: str
    detected_type: str
    owner_id: str
    task_id: str | None
    source: FileSource


class Files(Protocol):
    """Stores and reads files for other plugins.

    `facts`, `readable` and `made_for_task` run in the caller's unit of work. Call the other methods outside units of
    work, because they open their own. They raise `Unavailable` while the file store is down.
    """

    async def put(
        self,
        stream: AsyncIterable[bytes],
        *,
        name: str,
        owner_id: str,
        source: FileSource,
        task_id: str | None = None,
        visibility: FileVisibility = "private",
        content_type: str | None = None,
        expires_at: str | None = None,
        limit: int | None = None,
        cause: tuple[str, ...] = (),
    ) -> FileFacts:
        """Store a stream as a new file that belongs to a user. The file is either stored completely or not at all.

        `cause` lists the ids of the triggers and tasks that led to the upload. Triggers use these ids to detect loops.
        If a worker or an agent uploads the file for a task, the ids that led to this task are used instead. Raise
        `TooLarge` if the file is larger than `limit` bytes (by default, the setting `files.max_upload_bytes`), and
        `TooMany` (`quota_exceeded`) if the file would exceed the owner's quota.
        """
        ...

    def facts(self, file_id: str) -> FileFacts | None:
        """Return the facts about a file without checking permissions. Return None if the file does not exist."""
        ...

    def readable(self, file_id: str, *, by: Principal) -> FileFacts | None:
        """Return the facts about a file, or None if it does not exist or the caller may not read it."""
        ...

    def made_for_task(self, task_id: str) -> list[FileFacts]:
        """Return at most 100 files that workers and agents created for a task, oldest first.

        Runs in the caller's unit of work. Before calling this method, check that the user may read the task. Show the
        user only the names and ids of the files.
        """
        ...

    async def open(self, file_id: str) -> AsyncIterator[bytes]:
        """Return the bytes of a file in chunks, after checking that they are undamaged.

        The caller must have checked that the user may read the file. Raise `NotFound` if the file does not exist.
        """
        ...

    async def remove(self, file_id: str) -> bool:
        """Delete a file. Return False if it does not exist."""
        ...


class _FileEvent(Event, kw_only=True):
    """The fields of every event about a file.

    The event has the visibility `shared` if the file is shared with its task, and `private` otherwise.
    """

    file_id: str
    name: str
    size_bytes: int
    detected_type: str
    task_id: str | None
    owner_id: str


class FileUploaded(_FileEvent):
    """A file was stored."""

    event = "file.uploaded"
    visibility = PRIVATE


class FileUpdated(_FileEvent):
    """The name, the task, the visibility or the expiry of a file was changed."""

    event = "file.updated"
    visibility = PRIVATE


class FileDeleted(_FileEvent):
    """A file was deleted."""

    event = "file.deleted"
    visibility = PRIVATE


class FileDamaged(SystemAlert, kw_only=True):
    """Alerts admins that the stored bytes of a file differ from the uploaded bytes."""

    file_id: str


class FileMissing(SystemAlert, kw_only=True):
    """Alerts admins that a machine's file store does not contain the bytes of a file."""

    file_id: str


EVENTS = (FileUploaded, FileUpdated, FileDeleted)
