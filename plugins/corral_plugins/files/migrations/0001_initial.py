"""Creates the plugin's tables. The classes are frozen copies of the models from the first release."""

from __future__ import annotations

from typing import Any

from peewee import BigIntegerField, CharField, IntegerField, Model, TextField


def up(migrator: Any, db: Any) -> None:
    class File(Model):
        id = CharField(primary_key=True, max_length=36)
        owner_id = CharField(max_length=36)
        name = CharField(max_length=255)
        size_bytes = BigIntegerField()
        sha256 = CharField(max_length=64)
        content_type = CharField(max_length=255, null=True)
        detected_type = CharField(max_length=255)
        key = CharField(max_length=100, unique=True)
        task_id = CharField(max_length=36, null=True)
        visibility = CharField(max_length=10)
        source_type = CharField(max_length=10)
        source = TextField()
        expires_at = CharField(max_length=24, null=True)
        upload_key = CharField(max_length=64, null=True, unique=True)
        created_at = CharField(max_length=24)
        updated_at = CharField(max_length=24)
        version = IntegerField()

        class Meta:
            database = db
            legacy_table_names = False
            table_name = "files_files"
            indexes = (
                (("owner_id", "created_at", "id"), False),
                (("task_id", "created_at", "id"), False),
            )

    File.add_index(
        File.index(File.expires_at, File.id, name="files_files_expiry", where=File.expires_at.is_null(False))
    )

    class Upload(Model):
        id = CharField(primary_key=True, max_length=36)
        owner_id = CharField(max_length=36)
        reserved = BigIntegerField()
        renewed_at = CharField(max_length=24, index=True)

        class Meta:
            database = db
            legacy_table_names = False
            table_name = "files_uploads"

    class Usage(Model):
        owner_id = CharField(primary_key=True, max_length=36)
        files = IntegerField()
        bytes = BigIntegerField()
        reserved = BigIntegerField()

        class Meta:
            database = db
            legacy_table_names = False
            table_name = "files_usage"

    db.create_tables([File, Upload, Usage])
