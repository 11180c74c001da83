"""The database tables of the marketplace: stored templates, installations, and installed objects."""

from __future__ import annotations

import peewee

from corral.database.model import SHARED, IdField, InstantField, JSONField, Model


class StoredTemplate(Model):
    """A version of a template that an admin uploaded (`uploaded`) or that the remote index lists (`remote`).

    `template_id` is derived from the slug. `manifest` contains the manifest as text.
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

    `manifest` contains the text of the installed manifest. An upgrade compares this text with the new manifest.
    `missing` lists the required secrets, tools and grants that did not exist when the template was installed.
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
    """An object that belongs to an installation. Users cannot edit this row, so it reliably shows the object's origin.

    `position` is the object's position in the order of creation. `spec` is the spec with which the object was created
    or last upgraded, with references instead of ids. `fingerprint` contains the object's field values at that time. If
    `reused` is true, the object already existed before the installation, so an upgrade or removal of the installation
    leaves the object unchanged.
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
