"""Signs requests as defined by Standard Webhooks 1.0.0, creates secrets, and derives keys from secrets."""

from __future__ import annotations

import base64
import binascii
import hmac
import secrets

from corral.crypto import refuse_mask
from corral.errors import Invalid

PREFIX = "whsec_"
SECRET_BYTES = 32
FEWEST_BYTES, MOST_BYTES = 24, 64


class StandardSigner:
    """Implements `corral_plugins.webhooks.api.Signer`."""

    def sign(self, secret: str, *further: str, message_id: str, timestamp: int, body: bytes) -> dict[str, str]:
        signed = f"{message_id}.{timestamp}.".encode() + body
        signatures = [
            "v1," + base64.b64encode(hmac.digest(key_of(each), signed, "sha256")).decode()
            for each in (secret, *further)
        ]
        return {
            "webhook-id": message_id,
            "webhook-timestamp": str(timestamp),
            "webhook-signature": " ".join(signatures),
        }


def new_secret() -> str:
    """Return a new random secret."""
    return PREFIX + base64.b64encode(secrets.token_bytes(SECRET_BYTES)).decode()


def key_of(secret: str) -> bytes:
    """Return the signing key of a secret. Raise `ValueError` if a `whsec_` secret contains invalid Base64."""
    if not secret.startswith(PREFIX):
        return secret.encode()
    return base64.b64decode(secret.removeprefix(PREFIX), validate=True)


def check_secret(secret: str, pointer: str) -> None:
    """Raise `Invalid` unless the submitted text can be used as a secret."""
    refuse_mask(secret, pointer)
    if not secret.startswith(PREFIX):
        return
    try:
        size = len(key_of(secret))
    except (binascii.Error, ValueError):
        size = 0
    if not FEWEST_BYTES <= size <= MOST_BYTES:
        detail = f"must be {PREFIX} followed by the Base64 of {FEWEST_BYTES} to {MOST_BYTES} bytes"
        raise Invalid.at(pointer, "bad_format", detail)
