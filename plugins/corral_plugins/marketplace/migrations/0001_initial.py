"""Creates the plugin's tables. The classes are frozen copies of the models from the first release."""

from __future__ import annotations

from typing import Any

import peewee
from peewee import Model


def up(migrator: Any, db: Any) -> None:
    class Base(Model):
        class Meta:
            database = db
            legacy_table_names = False

    class StoredTemplate(Base):
        id = peewee.CharField(max_length=36, primary_key=True)
        template_id = peewee.CharField(max_length=36)
        slug = peewee.CharField(max_length=64)
        template_version = peewee.CharField(max_length=40)
        source = peewee.CharField(max_length=10)
        sha256 = peewee.CharField(max_length=64)
        manifest = peewee.TextField()
        created_by = peewee.CharField(max_length=36, null=True)
        created_at = peewee.CharField(max_length=24)

        class Meta:
            table_name = "marketplace_templates"
            indexes = ((("slug", "template_version"), True), (("template_id",), False))

    class Installation(Base):
        id = peewee.CharField(max_length=36, primary_key=True)
        template_id = peewee.CharField(max_length=36)
        slug = peewee.CharField(max_length=64)
        template_version = peewee.CharField(max_length=40)
        sha256 = peewee.CharField(max_length=64)
        manifest = peewee.TextField()
        parameters = peewee.TextField()
        secrets_map = peewee.TextField()
        name_prefix = peewee.CharField(max_length=40)
        missing = peewee.TextField()
        status = peewee.CharField(max_length=20)
        installed_by = peewee.CharField(max_length=36, null=True)
        created_at = peewee.CharField(max_length=24)
        updated_at = peewee.CharField(max_length=24)

        class Meta:
            table_name = "marketplace_installations"
            indexes = ((("created_at", "id"), False), (("template_id",), False))

    class InstalledResource(Base):
        id = peewee.CharField(max_length=36, primary_key=True)
        installation_id = peewee.CharField(max_length=36)
        position = peewee.IntegerField()
        kind = peewee.CharField(max_length=40)
        key = peewee.CharField(max_length=64)
        object_id = peewee.CharField(max_length=36)
        name = peewee.CharField(max_length=250)
        spec = peewee.TextField()
        fingerprint = peewee.TextField()
        reused = peewee.BooleanField()
        removed_at = peewee.CharField(max_length=24, null=True)

        class Meta:
            table_name = "marketplace_objects"
            indexes = ((("installation_id", "position"), False), (("object_id",), False))

    db.create_tables([StoredTemplate, Installation, InstalledResource])
