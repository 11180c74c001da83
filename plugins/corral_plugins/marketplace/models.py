"""The tables of the marketplace: stored templates, installations, and the objects that installations created."""

from __future__ import annotations

import peewee

from corral.database.model import SHARED, IdField, InstantField, JSONField, Model


class StoredTemplate(Model):
    """A version of a template that an admin uploaded (`uploaded`), or that the index lists (`remote`).

    `template_id` is derived from the slug. `manifest` is the text of the manifest.
    """

    visibility = SHARED

    id = IdField(primary_key=True)
    template_id = IdField()
    slug = peewee.CharField(max_length=64)
    template_version = peewee.CharField(max_length=40)
    source = peewee.CharField(max_length=10)
    sha256 = peewee.CharField(max_length=64)
    manifest = peewee.TextField()
    created_by = IdField(null=True)
    created_at = InstantField()

    class Meta:
        table_name = "marketplace_templates"
        indexes = ((("slug", "template_version"), True), (("template_id",), False))


class Installation(Model):
    """An installation of a template.

    `manifest` is the text of the installed version, which an upgrade compares with the new one. `missing` lists the
    required secrets, tools and grants that did not exist at the time of the installation.
    """

    visibility = SHARED
    owner_field = "installed_by"

    id = IdField(primary_key=True)
    template_id = IdField()
    slug = peewee.CharField(max_length=64)
    template_version = peewee.CharField(max_length=40)
    sha256 = peewee.CharField(max_length=64)
    manifest = peewee.TextField()
    parameters = JSONField()
    secrets_map = JSONField()
    name_prefix = peewee.CharField(max_length=40, default="")
    missing = JSONField()
    status = peewee.CharField(max_length=20, default="installed")
    installed_by = IdField(null=True)
    created_at = InstantField()
    updated_at = InstantField()

    class Meta:
        table_name = "marketplace_installations"
        indexes = ((("created_at", "id"), False), (("template_id",), False))


class InstalledResource(Model):
    """An object that belongs to an installation. Nobody can edit this row, so it shows where the object came from.

    `position` is the object's position in the order of creation. `spec` is the spec with which the object was created
    or last upgraded, with references instead of ids, and `fingerprint` contains the values that the object had
    afterwards. An object that the installation found and did not create is `reused`; it is never changed or removed.
    """

    visibility = SHARED

    id = IdField(primary_key=True)
    installation_id = IdField()
    position = peewee.IntegerField()
    kind = peewee.CharField(max_length=40)
    key = peewee.CharField(max_length=64)
    object_id = IdField()
    name = peewee.CharField(max_length=250)
    spec = JSONField()
    fingerprint = JSONField()
    reused = peewee.BooleanField(default=False)
    removed_at = InstantField(null=True)

    class Meta:
        table_name = "marketplace_objects"
        indexes = ((("installation_id", "position"), False), (("object_id",), False))


TABLES: tuple[type[Model], ...] = (StoredTemplate, Installation, InstalledResource)
