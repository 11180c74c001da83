"""API keys, for their owners."""

from __future__ import annotations

from corral.auth.permissions import Permissions
from corral.auth.principal import ROLES, SIGNED_IN, Principal
from corral.http.page import Page
from corral.http.routes import Routes
from corral_plugins.security.service.keys import ApiKeys
from corral_plugins.security.shapes import (
    IssuedKey,
    KeyQuery,
    KeyView,
    NewKey,
    Rotation,
    ScopeList,
    ScopeView,
)

routes = Routes("/security", tag="Security", no_store=True)


@routes.get("/api-keys", needs=SIGNED_IN)
def list_api_keys(query: KeyQuery, caller: Principal, keys: ApiKeys) -> Page[KeyView]:
    """List the own API keys; with `all`, for admins, those of everybody."""
    return keys.list(query, by=caller)


@routes.post(
    "/api-keys",
    needs=SIGNED_IN,
    own_session=True,
    status=201,
    raises=("quota_exceeded", "reauth_required"),
)
def create_api_key(body: NewKey, caller: Principal, keys: ApiKeys) -> IssuedKey:
    """Make an API key. `key` is shown this once.

    It may do what its scopes name and its owner may do at the time. Scopes such as `secrets.reveal` need a step-up.
    """
    return keys.create(body, by=caller)


@routes.get("/api-keys/{id}", needs=SIGNED_IN)
def get_api_key(id: str, caller: Principal, keys: ApiKeys) -> KeyView:
    """Get an own API key."""
    return keys.get(id, by=caller)


@routes.delete("/api-keys/{id}", needs=SIGNED_IN, own_session=True)
def revoke_api_key(id: str, caller: Principal, keys: ApiKeys) -> None:
    """Revoke an API key; admins may revoke those of others."""
    keys.revoke(id, by=caller)


@routes.post(
    "/api-keys/{id}/rotate",
    needs=SIGNED_IN,
    own_session=True,
    raises=("invalid_state", "reauth_required"),
)
def rotate_api_key(id: str, body: Rotation, caller: Principal, keys: ApiKeys) -> IssuedKey:
    """Give an own API key a new text. `key` is shown this once; the old text works for the overlap."""
    return keys.rotate(id, body.overlap_seconds, by=caller)


@routes.get("/scopes", needs=SIGNED_IN)
def list_scopes(permissions: Permissions) -> ScopeList:
    """What may be named in `scopes`, beside `<plugin>.*`, `*.read` and `*`."""
    found = [(item, [role for role in ROLES if item.held_by(role)]) for item in permissions.all()]
    return ScopeList(
        items=[
            ScopeView(scope=item.name, title=item.title, plugin=item.name.partition(".")[0], roles=roles)
            for item, roles in found
            if roles
        ]
    )
