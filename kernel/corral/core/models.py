"""Tables of `core` beside those of accounts: plugins out of service, links and invitations."""

from __future__ import annotations

import peewee

from corral.database.model import IdField, InstantField, Model


class PluginStateRow(Model):
    """A plugin that an admin took out of service; no row: it runs as configured."""

    name = peewee.CharField(primary_key=True, max_length=64)
    state = peewee.CharField(max_length=16)
    reason = peewee.TextField(null=True)
    since = InstantField()

    class Meta:
        table_name = "core_plugin_states"


class LinkRow(Model):
    """A link that is good once: it resets a password, proves an address or accepts an invitation.

    `hash` is the SHA-256 of the token; null while the link waits for a mail server to take its mail. `subject_id` is
    the account or invitation, `email` the address that the link proves. `used_at` also ends what was not used.
    """

    id = IdField(primary_key=True)
    kind = peewee.CharField(max_length=16)
    subject_id = IdField()
    email = peewee.CharField(max_length=254, null=True)
    hash = peewee.CharField(max_length=64, null=True, unique=True)
    created_at = InstantField()
    expires_at = InstantField(index=True)
    used_at = InstantField(null=True)

    class Meta:
        table_name = "core_links"
        indexes = ((("subject_id", "kind"), False),)


class InvitationRow(Model):
    """A person who may make an account of this role. `status`: pending | accepted | expired | revoked."""

    id = IdField(primary_key=True)
    email = peewee.CharField(max_length=254)
    email_key = peewee.CharField(max_length=254, index=True)
    role = peewee.CharField(max_length=10)
    status = peewee.CharField(max_length=10, default="pending")
    created_by = IdField(null=True)
    accepted_by = IdField(null=True, index=True)
    created_at = InstantField()
    expires_at = InstantField()

    class Meta:
        table_name = "core_invitations"
        indexes = ((("created_at", "id"), False),)


# one address has one invitation at a time
InvitationRow.add_index(
    peewee.ModelIndex(
        InvitationRow,
        (InvitationRow.email_key,),
        unique=True,
        where=peewee.SQL("status = 'pending'"),
        name="core_invitations_pending",
    )
)
