"""Encrypts and decrypts the secret members of channel configs."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import msgspec

from corral.crypto import InvalidSealedValue, KeyRotation, Sealer, associated_data, key_id
from corral_plugins.notifications.models import Channel


class ChannelCredentials:
    """Encrypts and decrypts the secrets of channels.

    No method needs a unit of work. All methods raise `Unavailable` while the vault is sealed.
    """

    def __init__(self, sealer: Sealer, keys: KeyRotation) -> None:
        self._sealer, self._keys = sealer, keys

    def has_key(self, row: Channel) -> bool:
        """Return whether the master key of a channel's secrets is loaded. A channel without secrets needs no key."""
        if row.secrets is None:
            return True
        with contextlib.suppress(InvalidSealedValue):
            return not self._keys.sealed and key_id(_decode_hex(row.secrets)) in self._keys.key_labels
        return True  # damaged: the attempt says so

    def seal(self, channel_id: str, secrets: Mapping[str, str]) -> str | None:
        """Return the secret members in encrypted form for storage, or None if there are none."""
        data = msgspec.json.encode(secrets)
        return self._sealer.encrypt(data, aad=_associated_data(channel_id)).hex() if secrets else None

    def secrets(self, row: Channel) -> dict[str, str]:
        """Return the secret members of a channel's config. Raise `InvalidSealedValue` if they are damaged."""
        if row.secrets is None:
            return {}
        opened = self._sealer.decrypt(_decode_hex(row.secrets), aad=_associated_data(row.id))
        return msgspec.json.decode(opened, type=dict[str, str])

    def readable_secrets(self, row: Channel) -> dict[str, str] | None:
        """Return the secret members of a channel's config, or None if they are damaged."""
        try:
            return self.secrets(row)
        except InvalidSealedValue:
            return None

    def config(self, row: Channel) -> dict[str, Any]:
        """Return the complete config of a channel, including its secret members."""
        return {**row.config, **self.secrets(row)}


def _decode_hex(text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError:
        raise InvalidSealedValue("the bytes are not a sealed value") from None


def _associated_data(channel_id: str) -> str:
    return associated_data("notifications_channels", channel_id, 1, "secrets")
