"""Routes for API keys and their scopes."""

from __future__ import annotations

from corral.auth.permissions import Permissions
from corral.auth.principal import ROLES, SIGNED_IN, Principal
from corral.http.page import Page
from corral.http.routes import Routes
from corral_plugins.security.service.api_keys import ApiKeys
from corral_plugins.security.shapes import ApiKeyRotation, IssuedKey, KeyQuery, KeyView, NewKey, ScopeList, ScopeView

routes = Routes("/security", tag="Security", no_store=True)


@routes.get("/api-keys", needs=SIGNED_IN)
def list_api_keys(query: KeyQuery, caller: Principal, keys: ApiKeys) -> Page[KeyView]:
    """List your own API keys. If `all` is true, admins get the keys of all users."""
    return keys.list(query, by=caller)


@routes.post(
    "/api-keys",
    needs=SIGNED_IN,
    own_session=True,
    status=201,
    raises=("quota_exceeded", "reauth_required"),
)
def create_api_key(body: NewKey, caller: Principal, keys: ApiKeys) -> IssuedKey:
    """Create an API key. Only this response contains the token, in the field `key`.

    A request with the key has the permissions that its scopes include and that its owner holds at the time of the
    request. To create a key with scopes such as `secrets.reveal`, re-authenticate first.
    """
    return keys.create(body, by=caller)


@routes.get("/api-keys/{id}", needs=SIGNED_IN)
def get_api_key(id: str, caller: Principal, keys: ApiKeys) -> KeyView:
    """Return one of your own API keys."""
    return keys.get(id, by=caller)


@routes.delete("/api-keys/{id}", needs=SIGNED_IN, own_session=True)
def revoke_api_key(id: str, caller: Principal, keys: ApiKeys) -> None:
    """Revoke an API key. Admins can revoke the keys of other users."""
    keys.revoke(id, by=caller)


@routes.post(
    "/api-keys/{id}/rotate",
    needs=SIGNED_IN,
    own_session=True,
    raises=("invalid_state", "reauth_required"),
)
def rotate_api_key(id: str, body: ApiKeyRotation, caller: Principal, keys: ApiKeys) -> IssuedKey:
    """Rotate one of your own API keys. Only this response contains the new token, in the field `key`.

    The old token stays valid for `overlap_seconds`.
    """
    return keys.rotate(id, body.overlap_seconds, by=caller)


@routes.get("/scopes", needs=SIGNED_IN)
def list_scopes(permissions: Permissions) -> ScopeList:
    """List the permissions that are accepted in `scopes`. The forms `<plugin>.*`, `*.read` and `*` are accepted too."""
    found = [(item, [role for role in ROLES if item.held_by(role)]) for item in permissions.all()]
    return ScopeList(
        items=[
            ScopeView(scope=item.name, title=item.title, plugin=item.name.partition(".")[0], roles=roles)
            for item, roles in found
            if roles
        ]
    )
