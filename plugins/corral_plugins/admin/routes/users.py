"""The routes for users and invitations.

Routes that change data do not accept API keys. They require the session of a signed-in admin.
"""

from __future__ import annotations

from typing import Any

import msgspec

from corral.auth.principal import Principal
from corral.database.engine import Work
from corral.http.answers import IfMatch, Request
from corral.http.page import Page, PageQuery
from corral.http.routes import Routes
from corral_core.accounts.api import (
    AccountRecovery,
    Accounts,
    Invitations,
    InvitationView,
    NewUser,
    PasswordLinks,
    UserPatch,
    UserQuery,
)
from corral_plugins.admin.service.users import UserAdministration
from corral_plugins.admin.shapes import (
    AdminUserView,
    CreatedUser,
    IssuedInvitation,
    NewInvitation,
    NewUserBody,
    ResetLink,
    UserChange,
)

routes = Routes("/admin", tag="Admin", no_store=True)

READ: dict[str, Any] = {"needs": "admin.read"}
WRITE: dict[str, Any] = {"needs": "admin.write", "own_session": True}


@routes.get("/users", **READ)
def list_users(query: UserQuery, caller: Principal, people: UserAdministration) -> Page[AdminUserView]:
    """List users, newest first."""
    return people.list(query, caller)


@routes.post("/users", **WRITE, status=201, raises=("duplicate", "weak_password", "overloaded"))
async def create_user(
    body: NewUserBody, caller: Principal, request: Request, accounts: Accounts, people: UserAdministration, work: Work
) -> CreatedUser:
    """Create a user. If no password is given, the user chooses one through a link."""
    hashed = None
    if body.password is not None:
        hashed = await accounts.hash_password(body.password, email=body.email, full_name=body.full_name)
    new = NewUser(
        email=body.email, full_name=body.full_name, role=body.role, must_change_password=body.must_change_password
    )
    return await work(lambda: people.create(new, hashed, by=caller), entry=request.unit_context(caller))


@routes.get("/users/{id}", **READ)
def get_user(id: str, accounts: Accounts, people: UserAdministration) -> AdminUserView:
    """Get a user."""
    return people.get_admin_view(accounts.get(id))


@routes.patch("/users/{id}", **WRITE, raises=("duplicate", "invalid_state", "last_admin"))
def update_user(
    id: str, body: UserChange, match: IfMatch, accounts: Accounts, people: UserAdministration
) -> AdminUserView:
    """Change a user.

    Set `is_active` to deactivate or reactivate the account. A change that removes permissions ends the user's sessions.
    """
    changes = {name: getattr(body, name) for name in body.__struct_fields__}
    return people.get_admin_view(accounts.update(id, UserPatch(**changes), if_match=match))


@routes.post("/users/{id}/unlock", **WRITE)
def unlock_user(id: str, match: IfMatch, rescue: AccountRecovery, people: UserAdministration) -> AdminUserView:
    """Unlock an account that is locked after too many failed sign-ins."""
    return people.get_admin_view(rescue.unlock(id, if_match=match))


@routes.post("/users/{id}/reset-password", **WRITE)
def reset_password(id: str, match: IfMatch, links: PasswordLinks) -> ResetLink:
    """Create a link that lets the user choose a new password.

    The old password stops working, and all sessions of the user end.
    """
    return ResetLink(reset_url=links.create_reset_link(id, if_match=match))


@routes.post("/users/{id}/reset-mfa", **WRITE, step_up=True)
def reset_mfa(id: str, match: IfMatch, rescue: AccountRecovery, people: UserAdministration) -> AdminUserView:
    """Remove the second factor of a user who has lost it, and end all sessions of the user."""
    return people.get_admin_view(rescue.reset_mfa(id, if_match=match))


@routes.get("/invitations", **READ)
def list_invitations(query: PageQuery, caller: Principal, invitations: Invitations) -> Page[InvitationView]:
    """List invitations, newest first."""
    return invitations.list(query, caller)


@routes.post("/invitations", **WRITE, status=201, raises=("duplicate",))
def create_invitation(body: NewInvitation, caller: Principal, invitations: Invitations) -> IssuedInvitation:
    """Invite a person. The response contains a link that lets the person create an account.

    If a mail server is configured, the link is also sent by email.
    """
    made, url = invitations.create(body.email, body.role, by=caller)
    return IssuedInvitation(**msgspec.structs.asdict(made), url=url)


@routes.delete("/invitations/{id}", **WRITE)
def revoke_invitation(id: str, invitations: Invitations) -> None:
    """Revoke a pending invitation. Its link stops working immediately."""
    invitations.revoke(id.lower())
