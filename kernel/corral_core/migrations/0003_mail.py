"""Links that are good once, invitations, and names in the form that is searched."""

from __future__ import annotations

from unicodedata import normalize

from peewee import SQL, CharField, Model, ModelIndex, TextField


def up(migrator, db):
    class Link(Model):
        id = CharField(max_length=36, primary_key=True)
        kind = CharField(max_length=16)
        subject_id = CharField(max_length=36)
        email = CharField(max_length=254, null=True)
        hash = CharField(max_length=64, null=True, unique=True)
        created_at = CharField(max_length=24)
        expires_at = CharField(max_length=24, index=True)
        used_at = CharField(max_length=24, null=True)

        class Meta:
            database = db
            legacy_table_names = False
            table_name = "core_links"
            indexes = ((("subject_id", "kind"), False),)

    class Invitation(Model):
        id = CharField(max_length=36, primary_key=True)
        email = CharField(max_length=254)
        email_key = CharField(max_length=254, index=True)
        role = CharField(max_length=10)
        status = CharField(max_length=10, default="pending")
        created_by = CharField(max_length=36, null=True)
        accepted_by = CharField(max_length=36, null=True, index=True)
        created_at = CharField(max_length=24)
        expires_at = CharField(max_length=24)

        class Meta:
            database = db
            legacy_table_names = False
            table_name = "core_invitations"
            indexes = ((("created_at", "id"), False),)

    pending = SQL("status = 'pending'")
    Invitation.add_index(
        ModelIndex(Invitation, (Invitation.email_key,), unique=True, where=pending, name="core_invitations_pending")
    )
    db.create_tables([Link, Invitation])
    _names(migrator, db)


def _names(migrator, db):
    class User(Model):
        id = CharField(max_length=36, primary_key=True)
        full_name = CharField(max_length=200)
        name_key = TextField(null=True)

        class Meta:
            database = db
            legacy_table_names = False
            table_name = "core_users"

    migrator.migrate(migrator.add_column("core_users", "name_key", TextField(null=True)))
    for user in User.select(User.id, User.full_name):
        key = normalize("NFKC", user.full_name).strip().casefold()
        User.update(name_key=key).where(User.id == user.id).execute()
