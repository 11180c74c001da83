"""The request and response bodies of the file routes."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import UNSET, Meta, UnsetType

from corral.http.page import PageQuery
from corral.schema.fields import Id, Instant, MomentIn, line
from corral_plugins.files.api import FileSource, FileVisibility, SourceType

FileName = Annotated[str, line(255)]


class UploadFields(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The text parts of an upload.

    If `name` is missing, the file name in the part `file` is used. The file is deleted at `expires_at`.
    """

    name: FileName | UnsetType = UNSET
    visibility: FileVisibility | UnsetType = UNSET
    expires_at: MomentIn | UnsetType = UNSET


class FileUpload(UploadFields, kw_only=True, forbid_unknown_fields=True):
    """The parts of an upload. `file` contains the file and its file name. The other parts are text."""

    file: Annotated[str, Meta(extra_json_schema={"format": "binary"})]


class UploadQuery(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The query parameters of an upload. `task_id` is the task to which the file belongs."""

    task_id: Id | UnsetType = UNSET


class FilePatch(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The file fields to change. Absent fields stay unchanged."""

    name: FileName | UnsetType = UNSET
    task_id: Id | UnsetType | None = UNSET
    visibility: FileVisibility | UnsetType = UNSET
    expires_at: MomentIn | UnsetType | None = UNSET


class FileQuery(PageQuery, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Filters for listing files. `search` matches text in file names."""

    task_id: Id | UnsetType = UNSET
    search: Annotated[str, line(200)] | UnsetType = UNSET
    source: SourceType | UnsetType = UNSET


class FileView(msgspec.Struct, kw_only=True):
    """A file.

    `content_type` is the media type that the client declared, and `detected_type` is the media type of the content.
    `type_mismatch` is true if they contradict each other. Downloads are served with a type derived from
    `detected_type`.
    """

    id: str
    name: str
    size_bytes: int
    sha256: str
    content_type: str | None
    detected_type: str
    type_mismatch: bool
    task_id: str | None
    visibility: FileVisibility
    owner_id: str
    source: FileSource
    expires_at: Instant | None
    created_at: Instant
    updated_at: Instant
    version: int


class FileLink(msgspec.Struct, kw_only=True):
    """A link for downloading one file without a login. The link is valid until `expires_at`."""

    url: str
    expires_at: Instant
    expires_in_seconds: int


class LinkQuery(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The query parameters of a download link: its expiry time in epoch seconds, and its signature."""

    expires: Annotated[str, Meta(max_length=20)] = ""
    signature: Annotated[str, Meta(max_length=200)] = ""


class FileUsage(msgspec.Struct, kw_only=True):
    """The number of the caller's files, and the bytes that they occupy.

    `quota_bytes` is the quota, or null if there is none.
    """

    files: int
    bytes: int
    quota_bytes: int | None
