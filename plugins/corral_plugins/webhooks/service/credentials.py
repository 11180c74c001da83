"""Encrypts and decrypts webhook secrets and headers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from corral import clock
from corral.crypto import InvalidSealedValue, Sealer, associated_data
from corral_plugins.webhooks.models import Webhook


class WebhookCredentials:
    """Encrypts and decrypts credentials. No method requires a unit of work.

    While the vault is sealed, because the master key is missing or wrong, all methods raise `Unavailable`.
    """

    def __init__(self, sealer: Sealer) -> None:
        self._sealer = sealer

    def seal_secret(self, webhook_id: str, secret: str) -> str:
        """Return a secret in the encrypted form in which it is stored."""
        return self._sealer.encrypt(secret.encode(), aad=_associated_data(webhook_id, "secret")).hex()

    def seal_headers(self, webhook_id: str, headers: Mapping[str, str]) -> str | None:
        """Return headers in the encrypted form in which they are stored, or None if there are no headers."""
        data = msgspec.json.encode(headers)
        return self._sealer.encrypt(data, aad=_associated_data(webhook_id, "headers")).hex() if headers else None

    def secrets(self, row: Webhook) -> list[str]:
        """Return the secrets to sign with: the current secret and, during the overlap period, the old secret."""
        is_old_valid = row.old_until is not None and row.old_until > clock.now()
        sealed = [row.secret, row.old_secret if is_old_valid else None]
        return [self._open(row.id, each, "secret").decode() for each in sealed if each is not None]

    def headers(self, row: Webhook) -> dict[str, str]:
        """Return the decrypted headers of a webhook."""
        found: dict[str, Any] = msgspec.json.decode(self._open(row.id, row.headers, "headers")) if row.headers else {}
        return found

    def _open(self, webhook_id: str, sealed: str, field: str) -> bytes:
        try:
            value = bytes.fromhex(sealed)
        except ValueError:
            raise InvalidSealedValue("the bytes are not a sealed value") from None
        return self._sealer.decrypt(value, aad=_associated_data(webhook_id, field))


def _associated_data(webhook_id: str, field: str) -> str:
    return associated_data("webhooks_webhooks", webhook_id, 1, field)
