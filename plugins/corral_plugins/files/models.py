"""The database tables for files. The bytes of a file are stored under a random storage key, which is never shown."""

from __future__ import annotations

from typing import Any

import peewee

from corral.database.model import ADMIN, PRIVATE, IdField, InstantField, JSONField, Model


class File(Model):
    """A stored file. The row is inserted only after the bytes are durably stored under `key`.

    `upload_key` identifies the upload that created the file, if the client sent an idempotency key.
    """

    visibility = PRIVATE
    owner_field = "owner_id"

    id = IdField(primary_key=True)
    owner_id = IdField()
    name = peewee.CharField(max_length=255)
    size_bytes = peewee.BigIntegerField()
    sha256 = peewee.CharField(max_length=64)
    content_type = peewee.CharField(max_length=255, null=True)
    detected_type = peewee.CharField(max_length=255)
    key = peewee.CharField(max_length=100, unique=True)
    task_id = IdField(null=True)
    shared_with = peewee.CharField(max_length=10, column_name="visibility")
    source_type = peewee.CharField(max_length=10)
    source: Any = JSONField()
    expires_at = InstantField(null=True)
    upload_key = peewee.CharField(max_length=64, null=True, unique=True)
    created_at = InstantField()
    updated_at = InstantField()
    version = peewee.IntegerField()

    class Meta:
        table_name = "files_files"
        indexes = (
            (("owner_id", "created_at", "id"), False),
            (("task_id", "created_at", "id"), False),
        )


File.add_index(File.index(File.expires_at, File.id, name="files_files_expiry", where=File.expires_at.is_null(False)))


class Upload(Model):
    """An upload in progress, with the number of bytes that it has reserved in the owner's quota.

    The process that receives the upload renews the row. After a crash, the row is no longer renewed, and the sweep
    releases the reserved bytes.
    """

    visibility = ADMIN

    id = IdField(primary_key=True)
    owner_id = IdField()
    reserved = peewee.BigIntegerField()
    renewed_at = InstantField(index=True)

    class Meta:
        table_name = "files_uploads"


class Usage(Model):
    """The number and total size of an owner's stored files, and the bytes that uploads in progress have reserved."""

    visibility = ADMIN

    owner_id = IdField(primary_key=True)
    files = peewee.IntegerField(default=0)
    bytes = peewee.BigIntegerField(default=0)
    reserved = peewee.BigIntegerField(default=0)

    class Meta:
        table_name = "files_usage"


TABLES: tuple[type[Model], ...] = (File, Upload, Usage)
