"""Keys of providers: in the vault, asked for at each call; those of `corral.toml` are in the connection already."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

import msgspec
from msgspec import UNSET

from corral.auth.principal import Principal
from corral.crypto import refuse_mask
from corral.database.engine import Work
from corral.errors import Forbidden, Invalid, Problem, Unavailable
from corral_plugins.llm.api import Connection, ProviderError
from corral_plugins.llm.provider_shapes import NewProvider, ProviderPatch
from corral_plugins.llm.service.provider import Provider
from corral_plugins.secrets.api import Attached, Secrets

TOLD = ("secret_expired", "vault_sealed")
REVEAL = "secrets.reveal"


class ProviderKeys:
    """`connection` opens its own unit, everything else joins the caller's."""

    secrets: Secrets | None

    def __init__(self, work: Work) -> None:
        self._work = work

    async def connection(self, provider: Provider) -> Connection:
        """The connection with its key; `ProviderError` when the vault does not give it."""
        name, secrets = provider.api_key_secret, self.secrets
        if name is None:
            return provider.connection
        if secrets is None:
            raise ProviderError(503, "The vault is out of service, which keeps the key.", code="dependency_unavailable")
        place, host = _attached(provider.name), urlsplit(provider.connection.base_url or "").hostname
        try:
            key = await self._work(lambda: secrets.use(name, place.consumer, host, attached=place), read=True)
        except Problem as problem:
            code = problem.code if problem.code in TOLD else "dependency_unavailable"
            raise ProviderError(problem.status, problem.detail, code=code) from problem
        return msgspec.structs.replace(provider.connection, api_key=key)

    def check(self, body: NewProvider | ProviderPatch) -> None:
        """Whether the key in a body can be taken: `plugin_disabled` without the vault, `masked_value_submitted`."""
        if _given(body.api_key) is None and _given(body.api_key_secret) is None:
            return
        if self.secrets is None:
            raise Unavailable(
                "Keys are kept by the plugin secrets, which is not active; put the key into corral.toml "
                "([plugins.llm.providers.<name>] api_key).",
                code="plugin_disabled",
                retry_after=60,
            )
        refuse_mask(_given(body.api_key), "/api_key")
        if _given(body.api_key) is not None and _given(body.api_key_secret) is not None:
            raise Invalid.at("/api_key", "not_allowed", "Give a key, or the name of a secret that holds it, not both.")

    def check_move(self, provider: Provider, patch: ProviderPatch, base_url: str | None, by: Principal) -> None:
        """Whether the stored key may go to another address: whoever reads it there has seen it.

        That takes what it takes to be shown it. Whoever sends a key anew knows that one.
        """
        if base_url == provider.connection.base_url or not _stays(provider.api_key_secret, patch):
            return
        if by.has_stepped_up or REVEAL in by.named:
            return
        detail = "The stored key would be sent to another base_url: send it again as api_key"
        if by.kind == "api_key":
            raise Forbidden(f"{detail}, or name the scope {REVEAL}.", code="insufficient_scope")
        raise Forbidden(f"{detail}, or give the password or a code to POST /auth/reauth.", code="reauth_required")

    def store(
        self, provider: str, body: NewProvider | ProviderPatch, by: Principal
    ) -> tuple[dict[str, Any], list[str]]:
        """Put the key of a body into the vault, or attach the named secret: the column, and warnings about the key."""
        key, name = body.api_key, body.api_key_secret
        if self.secrets is None or (key is UNSET and name is UNSET):
            return {}, []
        place = _attached(provider)
        warnings: list[str] = []
        if isinstance(key, str):
            name = f"llm.{provider}.api_key"
            warnings = self.secrets.keep(
                name, key, category="api_key", description=f"The key of the model provider {provider}.", by=by
            )
        if isinstance(name, str):
            pointer = "/api_key" if isinstance(key, str) else "/api_key_secret"
            named_by = None if isinstance(key, str) else by
            self.secrets.attach(name, place, title=provider, pointer=pointer, by=named_by)
            return {"api_key_secret": name}, warnings
        self.secrets.detach(place)
        return {"api_key_secret": None}, warnings

    def forget(self, provider: str) -> None:
        """The provider is deleted; the secret stays in the vault."""
        if self.secrets is not None:
            self.secrets.detach(_attached(provider))


def _attached(provider: str) -> Attached:
    return Attached(plugin="llm", kind="provider", id=provider)


def _stays(stored: str | None, patch: ProviderPatch) -> bool:
    """Whether the stored key is the provider's after the change too."""
    named = patch.api_key_secret
    if stored is None or isinstance(patch.api_key, str):
        return False
    if isinstance(named, str):
        return named.lower() == stored.lower()
    return named is UNSET and patch.api_key is UNSET


def _given(value: Any) -> str | None:
    return value if isinstance(value, str) else None
