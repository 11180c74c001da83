"""HTTP of the vault."""

from __future__ import annotations

from corral.auth.principal import Principal
from corral.http.answers import Answer, IfMatch
from corral.http.page import Page, PageQuery
from corral.http.routes import Rate, Routes
from corral_plugins.secrets.models import SecretRow
from corral_plugins.secrets.service.catalogue import Catalogue
from corral_plugins.secrets.service.keys import MasterKeys
from corral_plugins.secrets.service.values import warnings
from corral_plugins.secrets.service.vault import Vault
from corral_plugins.secrets.shapes import (
    DeleteQuery,
    ExpiringQuery,
    KeyStatus,
    NewSecret,
    Remaining,
    Reveal,
    Revealed,
    Rotation,
    SecretPatch,
    SecretQuery,
    SecretView,
    VersionView,
)

REVEALS = Rate("secret reveal", 30, 3600, "person")
READ, WRITE, REVEAL = "secrets.read", "secrets.write", "secrets.reveal"
CHANGES = ("not_found", "precondition_failed", "setting_locked", "vault_sealed")

routes = Routes("/secrets", tag="Secrets Vault", no_store=True)


def _shown(catalogue: Catalogue, row: SecretRow, value: str | None = None) -> Answer[SecretView]:
    """A secret with its ETag, which changes with every change of the row, while `version` is the value's."""
    view, revision = catalogue.shown(row)
    if told := warnings(value):
        view.warnings = told
    return Answer(body=view, headers={"ETag": f'"{revision}"'})


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


@routes.get("/", needs=READ)
def list_secrets(query: SecretQuery, catalogue: Catalogue, caller: Principal) -> Page[SecretView]:
    """List secrets by name; values are never shown. Deleted ones only with `status=deleted`."""
    return catalogue.page(query, caller)


@routes.post(
    "/",
    needs=WRITE,
    status=201,
    raises=("duplicate", "setting_locked", "masked_value_submitted", "vault_sealed"),
)
def create_secret(body: NewSecret, vault: Vault, catalogue: Catalogue, caller: Principal) -> Answer[SecretView]:
    """Store a secret. The answer warns of a value that is too short or too common to be taken out of texts."""
    return _shown(catalogue, vault.create(body, caller), body.value)


@routes.get("/expiring", needs=READ)
def list_expiring_secrets(query: ExpiringQuery, catalogue: Catalogue, caller: Principal) -> Page[SecretView]:
    """List secrets that expire within `days` and those that have expired, the first to expire first."""
    return catalogue.expiring(query, caller)


@routes.get("/key-status", needs=READ)
def get_key_status(keys: MasterKeys) -> KeyStatus:
    """Which master keys there are and how many rows need each; old keys may go when `remaining` is 0."""
    return keys.status()


@routes.post("/rotate-master-key", needs=WRITE, status=202, raises=("invalid_state", "vault_sealed"))
def rotate_master_key(keys: MasterKeys) -> Remaining:
    """Give every encrypted row the active master key, in the background."""
    return Remaining(remaining=keys.start())


@routes.get("/{id}", needs=READ, raises=("not_found",))
def get_secret(id: str, catalogue: Catalogue) -> Answer[SecretView]:
    """Read a secret without its value."""
    view, revision = catalogue.get(id)
    return Answer(body=view, headers={"ETag": f'"{revision}"'})


@routes.put(
    "/{id}",
    needs=WRITE,
    raises=(*CHANGES, "duplicate", "in_use", "masked_value_submitted"),
)
def update_secret(
    id: str, body: SecretPatch, match: IfMatch, vault: Vault, catalogue: Catalogue, caller: Principal
) -> Answer[SecretView]:
    """Change a secret; what is absent stays, also the value. A value makes a version."""
    return _shown(catalogue, vault.update(id, body, match, caller), _text(body.value))


@routes.delete("/{id}", needs=WRITE, raises=(*CHANGES, "in_use"))
def delete_secret(id: str, query: DeleteQuery, match: IfMatch, vault: Vault, caller: Principal) -> None:
    """Delete a secret; it can be restored for a while, then its keys are shredded."""
    vault.delete(id, match, caller, force=query.force)


@routes.post("/{id}/rotate", needs=WRITE, raises=(*CHANGES, "masked_value_submitted"))
def rotate_secret(
    id: str, body: Rotation, match: IfMatch, vault: Vault, catalogue: Catalogue, caller: Principal
) -> Answer[SecretView]:
    """Give a secret a new value: the one sent, or a generated one."""
    row, value = vault.rotate(id, body, match, caller)
    return _shown(catalogue, row, value)


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
def reveal_secret(id: str, body: Reveal, vault: Vault, caller: Principal) -> Revealed:
    """Show the value. Who, when and why is in the audit log before it leaves."""
    return vault.reveal(id, body, caller)


@routes.get("/{id}/versions", needs=READ, raises=("not_found",))
def list_secret_versions(id: str, query: PageQuery, catalogue: Catalogue, caller: Principal) -> Page[VersionView]:
    """List the versions of a secret, newest first."""
    return catalogue.versions(id, query, caller)


@routes.post("/{id}/versions/{n}/restore", needs=WRITE, raises=(*CHANGES, "secrets.destroyed", "secrets.damaged"))
def restore_secret_version(
    id: str, n: str, match: IfMatch, vault: Vault, catalogue: Catalogue, caller: Principal
) -> Answer[SecretView]:
    """Make the value of a version the newest one."""
    return _shown(catalogue, vault.restore_version(id, _number(n), match, caller))


@routes.delete("/{id}/versions/{n}", needs=WRITE, raises=(*CHANGES, "invalid_state"))
def destroy_secret_version(id: str, n: str, match: IfMatch, vault: Vault, caller: Principal) -> None:
    """Destroy a version for ever; not the current one."""
    vault.destroy_version(id, _number(n), match, caller)


@routes.post("/{id}/restore", needs=WRITE, raises=(*CHANGES, "duplicate"))
def restore_secret(
    id: str, match: IfMatch, vault: Vault, catalogue: Catalogue, caller: Principal
) -> Answer[SecretView]:
    """Undo the deletion of a secret."""
    return _shown(catalogue, vault.restore(id, match, caller))


def _number(text: str) -> int:
    """A version's number; no version has 0."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else 0
