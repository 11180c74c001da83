"""API keys of providers, which are stored in the vault and fetched for each call.

An API key in `corral.toml` is not stored in the vault. It is read with the rest of the provider's configuration.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

import msgspec
from msgspec import UNSET

from corral.auth.principal import Principal
from corral.crypto import refuse_mask
from corral.database.engine import Work
from corral.errors import Forbidden, Invalid, Problem, Unavailable
from corral_plugins.llm.api import ProviderConnection, ProviderError
from corral_plugins.llm.service.registry import Provider
from corral_plugins.llm.shapes import NewProvider, ProviderPatch
from corral_plugins.secrets.api import AttachedObject, Secrets

VAULT_CODES = ("secret_expired", "vault_sealed")
REVEAL = "secrets.reveal"
Body = NewProvider | ProviderPatch


class ProviderKeys:
    """Manages API keys of providers.

    `connection_with_key` opens its own unit of work. All other methods run in the caller's unit of work.
    """

    secrets: Secrets | None

    def __init__(self, work: Work) -> None:
        self._work = work

    async def connection_with_key(self, provider: Provider) -> ProviderConnection:
        """Return the provider's connection, with the API key from the vault if one is stored there.

        Raise `ProviderError` if the vault does not return the key.
        """
        name, secrets = provider.api_key_secret, self.secrets
        if name is None:
            return provider.connection
        if secrets is None:
            message = "The `secrets` plugin, which stores the API key, is not active."
            raise ProviderError(503, message, code="dependency_unavailable")
        attached, host = _attached_object(provider.name), urlsplit(provider.connection.base_url or "").hostname
        try:
            key = await self._work(
                lambda: secrets.use_value(name, attached.consumer_name, host, attached=attached), read=True
            )
        except Problem as problem:
            code = problem.code if problem.code in VAULT_CODES else "dependency_unavailable"
            raise ProviderError(problem.status, problem.detail, code=code) from problem
        return msgspec.structs.replace(provider.connection, api_key=key)

    def validate_key(self, body: Body) -> None:
        """Check the API key in a request body.

        Raise a `Problem` with the code `plugin_disabled` if the vault is unavailable, or `masked_value_submitted` if
        the key is a masked value.
        """
        has_key, has_secret = isinstance(body.api_key, str), isinstance(body.api_key_secret, str)
        if not has_key and not has_secret:
            return
        if self.secrets is None:
            raise Unavailable(
                "The `secrets` plugin, which stores API keys, is not active; put the key into corral.toml "
                "([plugins.llm.providers.<name>] api_key).",
                code="plugin_disabled",
                retry_after=60,
            )
        refuse_mask(body.api_key if isinstance(body.api_key, str) else None, "/api_key")
        if has_key and has_secret:
            detail = "Give either an API key or the name of a secret that holds it, not both."
            raise Invalid.at("/api_key", "not_allowed", detail)

    def check_address_change(
        self, provider: Provider, patch: ProviderPatch, base_url: str | None, by: Principal
    ) -> None:
        """Raise `Forbidden` if the caller is not allowed to change the address to which the stored key is sent.

        The operator of the new address could read the key, so the caller needs the permission to reveal it. A caller
        who submits the key again already knows it, and needs no permission.
        """
        if base_url == provider.connection.base_url or not _keeps_key(provider.api_key_secret, patch):
            return
        if by.has_stepped_up or REVEAL in by.named_scopes:
            return
        detail = "The stored API key would be sent to a different base_url. Send the key again as api_key"
        if by.kind == "api_key":
            raise Forbidden(f"{detail}, or use an API key with the scope {REVEAL}.", code="insufficient_scope")
        raise Forbidden(
            f"{detail}, or confirm your identity with `corral api POST /auth/reauth`.", code="reauth_required"
        )

    def store_key(self, provider: str, body: Body, by: Principal) -> tuple[dict[str, Any], list[str]]:
        """Store the API key from a request body in the vault, or use the existing secret named in the body.

        Return the changed columns of the provider's row, and warnings about the key.
        """
        key, secret = body.api_key, body.api_key_secret
        if self.secrets is None or (key is UNSET and secret is UNSET):
            return {}, []
        attached = _attached_object(provider)
        if isinstance(key, str):
            name = f"llm.{provider}.api_key"
            description = f"The API key of the model provider {provider}."
            warnings = self.secrets.store_value(name, key, category="api_key", description=description, by=by)
            self.secrets.attach(name, attached, title=provider, pointer="/api_key", by=None)
            return {"api_key_secret": name}, warnings
        if isinstance(secret, str):
            self.secrets.attach(secret, attached, title=provider, pointer="/api_key_secret", by=by)
            return {"api_key_secret": secret}, []
        self.secrets.detach(attached)
        return {"api_key_secret": None}, []

    def detach_secret(self, provider: str) -> None:
        """Detach the secret of a deleted provider. The secret stays in the vault."""
        if self.secrets is not None:
            self.secrets.detach(_attached_object(provider))


def _attached_object(provider: str) -> AttachedObject:
    return AttachedObject(plugin="llm", kind="provider", id=provider)


def _keeps_key(stored: str | None, patch: ProviderPatch) -> bool:
    """Return whether the provider still uses the stored secret after this change to its configuration."""
    secret = patch.api_key_secret
    if stored is None or isinstance(patch.api_key, str):
        return False
    if isinstance(secret, str):
        return secret.lower() == stored.lower()
    return secret is UNSET and patch.api_key is UNSET
