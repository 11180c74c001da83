"""The `corral invitations` commands, with which admins see and revoke invitations."""

from __future__ import annotations

import click

from corral.cli.api_client import ApiClient, ApiClientError
from corral.cli.output import print_table, print_value
from corral.cli.server_connection import client_command
from corral.ids import parse_id

COLUMNS = ("email", "role", "status", "created_at", "expires_at", "id")
STATUSES = ("pending", "accepted", "expired", "revoked")


@click.group("invitations")
def invitations_command_group() -> None:
    """List and revoke invitations to create an account. To send an invitation, use `corral user invite`."""


@invitations_command_group.command("list")
@click.option(
    "--status", type=click.Choice(STATUSES), multiple=True, help="list only invitations with this status; repeatable"
)
@client_command
def list_invitations(client: ApiClient, *, status: tuple[str, ...], as_json: bool) -> None:
    """List invitations, newest first."""
    items = [item for item in client.pages("/admin/invitations") if not status or item["status"] in status]
    print_table(items, COLUMNS, as_json=as_json, empty="There are no such invitations.")


@invitations_command_group.command("revoke")
@click.argument("invitation", metavar="EMAIL|ID")
@client_command
def revoke_invitation(client: ApiClient, *, invitation: str, as_json: bool) -> None:
    """Revoke a pending invitation. Its link stops working immediately."""
    found = parse_id(invitation) or _find_pending(client, invitation)
    client.send("DELETE", f"/admin/invitations/{found}")
    print_value({"revoked": found}, as_json=as_json, text=f"The invitation {invitation} was revoked.")


def _find_pending(client: ApiClient, email: str) -> str:
    """Return the id of the pending invitation for this email address. Raise `ApiClientError` if there is none."""
    for item in client.pages("/admin/invitations"):
        if item["status"] == "pending" and item["email"].casefold() == email.strip().casefold():
            return str(item["id"])
    raise ApiClientError(f"{email} has no pending invitation; `corral invitations list` lists all invitations")
