"""The HTTP routes for the vault."""

from __future__ import annotations

from corral.auth.principal import Principal
from corral.http.answers import Answer, IfMatch
from corral.http.page import Page, PageQuery
from corral.http.routes import Rate, Routes
from corral_plugins.secrets.models import SecretRow
from corral_plugins.secrets.service.listing import SecretListing
from corral_plugins.secrets.service.master_key_rotation import MasterKeyRotation
from corral_plugins.secrets.service.values import value_warnings
from corral_plugins.secrets.service.vault import Vault
from corral_plugins.secrets.shapes import (
    ExpiringQuery,
    KeyStatus,
    NewSecret,
    RemainingRows,
    RevealedSecret,
    RevealRequest,
    SecretDeleteQuery,
    SecretPatch,
    SecretQuery,
    SecretRotation,
    SecretView,
    VersionView,
)

REVEALS = Rate("secret reveal", 30, 3600, "person")
READ, WRITE, REVEAL = "secrets.read", "secrets.write", "secrets.reveal"
CHANGES = ("not_found", "precondition_failed", "setting_locked", "vault_sealed")

routes = Routes("/secrets", tag="Secrets Vault", no_store=True)


def _secret_response(listing: SecretListing, row: SecretRow, value: str | None = None) -> Answer[SecretView]:
    """Return the response for a secret.

    The ETag is the revision of the secret's row. The `version` field is the number of the current value.
    """
    view, revision = listing.view_of_row(row)
    if found := value_warnings(value):
        view.warnings = found
    return Answer(body=view, headers={"ETag": f'"{revision}"'})


def _text_or_none(value: object) -> str | None:
    return value if isinstance(value, str) else None


@routes.get("/", needs=READ)
def list_secrets(query: SecretQuery, listing: SecretListing, caller: Principal) -> Page[SecretView]:
    """List secrets, sorted by name, without their values. Deleted secrets are included only with `status=deleted`."""
    return listing.list_secrets(query, caller)


@routes.post(
    "/",
    needs=WRITE,
    status=201,
    raises=("duplicate", "setting_locked", "masked_value_submitted", "vault_sealed"),
)
def create_secret(body: NewSecret, vault: Vault, listing: SecretListing, caller: Principal) -> Answer[SecretView]:
    """Store a secret. The response contains a warning if the value is too short or too common to be redacted."""
    return _secret_response(listing, vault.create(body, caller), body.value)


@routes.get("/expiring", needs=READ)
def list_expiring_secrets(query: ExpiringQuery, listing: SecretListing, caller: Principal) -> Page[SecretView]:
    """List secrets that have expired or will expire within `days` days, earliest expiry first."""
    return listing.list_expiring(query, caller)


@routes.get("/key-status", needs=READ)
def get_key_status(keys: MasterKeyRotation) -> KeyStatus:
    """Get the master keys and the number of rows encrypted under each. If `remaining` is 0, old keys can be removed."""
    return keys.key_status()


@routes.post("/rotate-master-key", needs=WRITE, status=202, raises=("invalid_state", "vault_sealed"))
def rotate_master_key(keys: MasterKeyRotation) -> RemainingRows:
    """Rewrap every encrypted row under the active master key. The work runs in the background."""
    return RemainingRows(remaining=keys.enqueue_rotation())


@routes.get("/{id}", needs=READ, raises=("not_found",))
def get_secret(id: str, listing: SecretListing) -> Answer[SecretView]:
    """Get a secret without its value."""
    view, revision = listing.get_secret(id)
    return Answer(body=view, headers={"ETag": f'"{revision}"'})


@routes.put(
    "/{id}",
    needs=WRITE,
    raises=(*CHANGES, "duplicate", "in_use", "masked_value_submitted"),
)
def update_secret(
    id: str, body: SecretPatch, match: IfMatch, vault: Vault, listing: SecretListing, caller: Principal
) -> Answer[SecretView]:
    """Change a secret. Absent fields stay unchanged. A new value creates a new version."""
    return _secret_response(listing, vault.update(id, body, match, caller), _text_or_none(body.value))


@routes.delete("/{id}", needs=WRITE, raises=(*CHANGES, "in_use"))
def delete_secret(id: str, query: SecretDeleteQuery, match: IfMatch, vault: Vault, caller: Principal) -> None:
    """Delete a secret. It can be restored during the retention period. After that, its keys are destroyed."""
    vault.delete(id, match, caller, force=query.force)


@routes.post("/{id}/rotate", needs=WRITE, raises=(*CHANGES, "masked_value_submitted"))
def rotate_secret(
    id: str, body: SecretRotation, match: IfMatch, vault: Vault, listing: SecretListing, caller: Principal
) -> Answer[SecretView]:
    """Replace the value of a secret with a given or generated value."""
    row, value = vault.rotate(id, body, match, caller)
    return _secret_response(listing, row, value)


@routes.post(
    "/{id}/reveal",
    needs=REVEAL,
    keyed=False,
    step_up=True,
    rate=REVEALS,
    raises=(
        "not_found",
        "setting_locked",
        "secret_expired",
        "audit_unavailable",
        "vault_sealed",
        "secrets.destroyed",
        "secrets.damaged",
    ),
)
def reveal_secret(id: str, body: RevealRequest, vault: Vault, caller: Principal) -> RevealedSecret:
    """Reveal the value of a secret. The user, the time and the reason are recorded before the response is sent."""
    return vault.reveal(id, body, caller)


@routes.get("/{id}/versions", needs=READ, raises=("not_found",))
def list_secret_versions(id: str, query: PageQuery, listing: SecretListing, caller: Principal) -> Page[VersionView]:
    """List the versions of a secret, newest first."""
    return listing.list_versions(id, query, caller)


@routes.post("/{id}/versions/{n}/restore", needs=WRITE, raises=(*CHANGES, "secrets.destroyed", "secrets.damaged"))
def restore_secret_version(
    id: str, n: str, match: IfMatch, vault: Vault, listing: SecretListing, caller: Principal
) -> Answer[SecretView]:
    """Restore an earlier value of a secret by storing it as a new version."""
    return _secret_response(listing, vault.restore_version(id, _version_number(n), match, caller))


@routes.delete("/{id}/versions/{n}", needs=WRITE, raises=(*CHANGES, "invalid_state"))
def destroy_secret_version(id: str, n: str, match: IfMatch, vault: Vault, caller: Principal) -> None:
    """Destroy a version permanently. The current version cannot be destroyed."""
    vault.destroy_version(id, _version_number(n), match, caller)


@routes.post("/{id}/restore", needs=WRITE, raises=(*CHANGES, "duplicate"))
def restore_secret(
    id: str, match: IfMatch, vault: Vault, listing: SecretListing, caller: Principal
) -> Answer[SecretView]:
    """Restore a deleted secret."""
    return _secret_response(listing, vault.restore(id, match, caller))


def _version_number(text: str) -> int:
    """Parse a version number. Return 0 for invalid text, because no version has this number."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else 0
