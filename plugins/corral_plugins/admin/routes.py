"""People and the kill switch, for admins."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import UNSET, UnsetType

from corral.auth.principal import Principal
from corral.core.api import Accounts, Address, FullName, NewUser, Password, Role, UserPatch, UserQuery, UserView
from corral.database.engine import Work
from corral.http.answers import IfMatch
from corral.http.page import Page
from corral.http.routes import Routes
from corral_plugins.admin.api import KillSwitchView
from corral_plugins.admin.service import KillSwitchChange, KillSwitchService

routes = Routes("/admin", tag="Admin")


class NewUserBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """An account as an admin makes it."""

    email: Address
    full_name: FullName
    password: Password
    role: Role = "member"
    must_change_password: bool = False


class UserChange(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What an admin may change of an account; absent fields stay."""

    email: Address | UnsetType = UNSET
    full_name: FullName | UnsetType = UNSET
    role: Role | UnsetType = UNSET
    is_active: Annotated[bool, msgspec.Meta(description="false deactivates and ends every session")] | UnsetType = UNSET
    must_change_password: bool | UnsetType = UNSET


@routes.get("/users", needs="admin.read")
def list_users(query: UserQuery, caller: Principal, accounts: Accounts) -> Page[UserView]:
    """List all users."""
    return accounts.list(query, caller)


@routes.post("/users", needs="admin.write", status=201, raises=("duplicate", "weak_password"))
async def create_user(body: NewUserBody, caller: Principal, accounts: Accounts, work: Work) -> UserView:
    """Create a user, who may sign in at once."""
    hashed = await accounts.hash_password(body.password, email=body.email, full_name=body.full_name)
    new = NewUser(
        email=body.email, full_name=body.full_name, role=body.role, must_change_password=body.must_change_password
    )
    return await work(lambda: accounts.create(new, password_hash=hashed, by=caller))


@routes.get("/users/{id}", needs="admin.read")
def get_user(id: str, accounts: Accounts) -> UserView:
    """Get a user."""
    return accounts.get(id)


@routes.patch("/users/{id}", needs="admin.write", raises=("duplicate", "last_admin"))
def update_user(id: str, body: UserChange, match: IfMatch, accounts: Accounts) -> UserView:
    """Change a user; `is_active` deactivates and reactivates. Lost rights end the sessions."""
    changes = {name: getattr(body, name) for name in body.__struct_fields__}
    return accounts.update(id, UserPatch(**changes), if_match=match)


@routes.get("/kill-switch", needs="admin.read")
def get_kill_switch(switch: KillSwitchService) -> KillSwitchView:
    """The kill switch as it is."""
    return switch.state()


@routes.post("/kill-switch", needs="admin.kill_switch")
def change_kill_switch(body: KillSwitchChange, caller: Principal, switch: KillSwitchService) -> KillSwitchView:
    """Stop all agent activity at once, or let it go on."""
    return switch.change(body, by=caller)
