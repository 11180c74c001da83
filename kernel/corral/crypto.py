"""Envelope encryption of stored credentials under the master keys, and keyed digests.

A sealed value is `version(1) key_id(8) nonce(12) wrapped_data_key(48) nonce(12) ciphertext+tag`, with lengths in bytes.
Each value has a random data key, which is wrapped by a key derived from a master key, so `rewrap` leaves the ciphertext
unchanged. The library `cryptography` is imported on first use, because the import takes 25 ms.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import os
import secrets
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from corral.config.model import Config
from corral.config.reader import readable_by_others
from corral.errors import Invalid, StartupError, Unavailable

KEY_FILE = "master.key"
_VERSION = b"\x01"
_ID, _NONCE, _DATA_KEY, _TAG = 8, 12, 32, 16
_HEAD = 1 + _ID
_BODY = _HEAD + _NONCE + _DATA_KEY + _TAG


class InvalidSealedValue(ValueError):
    """Raised when a sealed value was changed or truncated, or was copied from another row or column."""


def associated_data(table: str, row: str, version: int, field: str = "value") -> str:
    """Return the associated data (`aad`) that identifies one column of one row.

    A ciphertext is bound to its associated data, so a copy of it in another row or column cannot be decrypted.
    """
    return f"{table}|{row}|{version}|{field}"


def refuse_mask(value: str | None, pointer: str) -> None:
    """Raise `masked_value_submitted` if a credential consists only of asterisks.

    Forms display asterisks instead of a stored credential. Call this function for every credential that a person
    submits, so that the asterisks never replace the stored credential.
    """
    if value and not value.strip().strip("*"):
        detail = "This is the mask of a stored value; omit the field to keep the stored value."
        raise Invalid.at(pointer, "not_allowed", detail, problem="masked_value_submitted")


def key_encodings(name: str, key: bytes) -> dict[str, str]:
    """Return the text encodings of a binary key, keyed by name. The redactor removes these encodings from text."""
    return {name: base64.b64encode(key).decode(), f"{name}.hex": key.hex()}


def derive(master: bytes, purpose: str) -> bytes:
    """Derive a 256-bit key for the given purpose with one block of HKDF-SHA256 (RFC 5869)."""
    extracted = hmac.digest(b"corral", master, "sha256")
    return hmac.digest(extracted, purpose.encode() + b"\x01", "sha256")


def new_secret() -> str:
    """Return a random opaque token of 256 bits, for a cookie, a header or a body."""
    return secrets.token_urlsafe(32)


def digest(secret: str) -> str:
    """Return the SHA-256 digest of an opaque token. Only the digest is stored, never the token."""
    return hashlib.sha256(secret.encode()).hexdigest()


class MasterKey(NamedTuple):
    """A master key.

    `label` is chosen by the operator, for example `v2`. `id` is derived from the key and stored in each sealed value.
    """

    label: str
    id: str
    secret: bytes

    def __repr__(self) -> str:
        return f"<MasterKey {self.label} {self.id}>"


def parse_master_keys(text: str, source: str) -> list[MasterKey]:
    """Parse master keys of the form `v2:<base64>,v1:<base64>`. The first key is the active key.

    Raise a `StartupError` that names `source` but never contains a key.
    """
    keys: list[MasterKey] = []
    for number, part in enumerate(text.split(","), 1):
        label, _, encoded = part.strip().partition(":")
        plain = encoded.strip().rstrip("=").translate(str.maketrans("-_", "+/"))
        try:
            secret = base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
        except ValueError:
            secret = b""
        if not label.isalnum() or len(secret) != 32:
            raise StartupError(f"{source}: entry {number} must be <label>:<base64 of 32 bytes>")
        if len(set(secret)) < 8:  # 1 in 10^44 for a random key
            raise StartupError(f"{source}: entry {number} is a well-known default; use a random key")
        keys.append(MasterKey(label, derive(secret, "key-id")[:_ID].hex(), secret))
    if len({key.label for key in keys}) < len(keys) or len({key.id for key in keys}) < len(keys):
        raise StartupError(f"{source}: two entries have the same label or key; see `corral keys generate --label`")
    return keys


class Sealer(Protocol):
    """Encrypts, decrypts and signs data with the master keys of the installation. Plugins use it as a service.

    While `sealed` is true, no usable master key is loaded, so `encrypt` and `decrypt` raise `Unavailable`
    (`vault_sealed`). `mac` and `verify` still work.
    """

    sealed: bool

    def encrypt(self, plaintext: bytes, *, aad: str) -> bytes:
        """Encrypt a value for the row and column that `aad` identifies (see `associated_data`)."""
        ...

    def decrypt(self, sealed: bytes, *, aad: str) -> bytes:
        """Decrypt a value. Raise `InvalidSealedValue` if the value was changed or belongs to another row or column."""
        ...

    def mac(self, purpose: str, data: bytes) -> bytes:
        """Return the HMAC-SHA256 of `data` for the given purpose. The MAC changes when the master key is rotated."""
        ...

    def verify(self, purpose: str, data: bytes, mac: bytes) -> bool:
        """Return whether `mac` is the MAC of `data` under any of the master keys."""
        ...


class KeyRotation(Protocol):
    """A service for plugins that moves sealed values to the active master key without decrypting them.

    `sealed` has the same meaning as in `Sealer`.
    """

    sealed: bool

    @property
    def key_labels(self) -> Mapping[str, str]:
        """The labels of the loaded master keys, keyed by key id. The active key is the first."""
        ...

    @property
    def active_id(self) -> str:
        """The id of the active key. Raises `Unavailable` (`vault_sealed`) if no usable key is loaded."""
        ...

    def rewrap(self, sealed: bytes) -> bytes:
        """Return the sealed value with its data key wrapped by the active key."""
        ...

    def can_unwrap(self, sealed: bytes) -> bool:
        """Return whether one of the loaded keys can unwrap the data key of the value."""
        ...


class Keyring:
    """The master keys of this process. The first key encrypts values; every key can decrypt values.

    The keyring is `sealed` if it contains no key, or if `update_seal_state` finds that values are stored but no loaded
    key has sealed any of them. Encryption and decryption then raise `Unavailable` (`vault_sealed`). MACs still work; if
    no key is loaded, they use `start_secret`, or a random key of this process.
    """

    def __init__(self, keys: Sequence[MasterKey] = (), *, source: str = "", start_secret: bytes = b"") -> None:
        self.keys = tuple(keys)
        self.source = source
        self.sealed = not self.keys
        self._by_id = {key.id: key for key in self.keys}
        self._signing = [key.secret for key in self.keys] or [start_secret or secrets.token_bytes(32)]

    @classmethod
    def load(cls, config: Config, *, allow_create: bool = False, start_secret: bytes = b"") -> Keyring:
        """Load the master keys from the configuration, or else from the key file in the data folder.

        With `allow_create`, the key file is created if it is missing. Pass `allow_create` only if no sealed value
        exists. Otherwise, a new key would hide the loss of the correct key. Raise `StartupError` if a key is invalid,
        or if other users can read the key file.
        """
        if config.keys.master_key:
            source = config.sources.get("keys.master_key", "keys.master_key")
            return cls(parse_master_keys(config.keys.master_key, source), source=source)
        path = config.data_dir / KEY_FILE
        try:
            if allow_create and not path.exists():
                _create_key_file(path)
            if not path.exists():
                return cls(source=str(path), start_secret=start_secret)
            if readable_by_others(path):
                raise StartupError(f"{path}: other users can read this key; run chmod 600 {path}")
            text = path.read_text("ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise StartupError(f"{path}: the master key cannot be read or created: {error}") from None
        return cls(parse_master_keys(text, str(path)), source=str(path))

    def encoded_keys(self) -> dict[str, str]:
        """Return the text encodings of all keys, keyed by name, so that the redactor can remove them from text."""
        return {
            name: text for key in self.keys for name, text in key_encodings(f"keys.{key.label}", key.secret).items()
        }

    @property
    def active(self) -> MasterKey:
        """The master key that seals new values. Raises `Unavailable` if the keyring is sealed."""
        if self.sealed:
            raise Unavailable("No usable master key is loaded; start the server with one.", code="vault_sealed")
        return self.keys[0]

    @property
    def active_id(self) -> str:
        """The id of the active key."""
        return self.active.id

    @property
    def key_labels(self) -> dict[str, str]:
        """The labels of all keys, keyed by key id. The active key is the first."""
        return {key.id: key.label for key in self.keys}

    def update_seal_state(self, key_ids: Iterable[str]) -> None:
        """Seal or unseal the keyring according to the key ids of the stored values.

        The keyring is sealed if there are stored values but no loaded key sealed any of them, because the loaded keys
        are then the wrong ones.
        """
        stored = set(key_ids)
        self.sealed = not self.keys or (bool(stored) and stored.isdisjoint(self._by_id))

    def encrypt(self, plaintext: bytes, *, aad: str) -> bytes:
        """Encrypt a value for the row and column that `aad` identifies (see `associated_data`).

        The result is 97 bytes longer than the plaintext.
        """
        head = _VERSION + bytes.fromhex(self.active.id)
        data_key = secrets.token_bytes(_DATA_KEY)
        wrapped = _encrypt(derive(self.active.secret, "wrap"), data_key, head)
        return head + wrapped + _encrypt(data_key, plaintext, _versioned_aad(aad))

    def decrypt(self, sealed: bytes, *, aad: str) -> bytes:
        """Decrypt a value.

        Raise `InvalidSealedValue` if the value was changed or belongs to another row or column, and `Unavailable` if
        its master key is not loaded.
        """
        return _decrypt(self._data_key(sealed), sealed[_BODY:], _versioned_aad(aad))

    def rewrap(self, sealed: bytes) -> bytes:
        """Return the sealed value with its data key wrapped by the active master key."""
        head = _VERSION + bytes.fromhex(self.active.id)
        if sealed.startswith(head):
            return sealed
        return head + _encrypt(derive(self.active.secret, "wrap"), self._data_key(sealed), head) + sealed[_BODY:]

    def can_unwrap(self, sealed: bytes) -> bool:
        """Return whether a loaded master key can unwrap the value's data key. The check needs no `aad`."""
        try:
            return bool(self._data_key(sealed))
        except (InvalidSealedValue, Unavailable):
            return False

    def _data_key(self, sealed: bytes) -> bytes:
        key = self._by_id.get(key_id(sealed))
        if key is None or self.sealed:
            raise Unavailable("The master key that encrypted this value is not loaded.", code="vault_sealed")
        return _decrypt(derive(key.secret, "wrap"), sealed[_HEAD:_BODY], sealed[:_HEAD])

    def mac(self, purpose: str, data: bytes) -> bytes:
        """Return the HMAC-SHA256 of `data` under the active key. It changes only when the active key changes."""
        return hmac.digest(derive(self._signing[0], f"mac/{purpose}"), data, "sha256")

    def verify(self, purpose: str, data: bytes, mac: bytes) -> bool:
        """Return whether `mac` is the MAC of `data` under any of the keys."""
        keys = [derive(secret, f"mac/{purpose}") for secret in self._signing]
        return any(hmac.compare_digest(hmac.digest(key, data, "sha256"), mac) for key in keys)


def key_id(sealed: bytes) -> str:
    """Return the id of the master key that a sealed value needs. Raise `InvalidSealedValue` if it is malformed."""
    if sealed[:1] != _VERSION or len(sealed) < _BODY + _NONCE + _TAG:
        raise InvalidSealedValue("the bytes are not a sealed value")
    return sealed[1:_HEAD].hex()


def _versioned_aad(aad: str) -> bytes:
    if not aad:
        raise ValueError("the associated data must say where the value is stored; create it with associated_data()")
    return _VERSION + aad.encode()


def _encrypt(key: bytes, plaintext: bytes, aad: bytes) -> bytes:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    nonce = secrets.token_bytes(_NONCE)
    return nonce + AESGCM(key).encrypt(nonce, plaintext, aad)


def _decrypt(key: bytes, sealed: bytes, aad: bytes) -> bytes:
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    try:
        return AESGCM(key).decrypt(sealed[:_NONCE], sealed[_NONCE:], aad)
    except InvalidTag:
        raise InvalidSealedValue("the sealed value was changed or belongs to another place") from None


def _create_key_file(path: Path) -> None:
    """Create the key file atomically.

    If several processes start at the same time, one of them creates the file and the others read it.
    """
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.") as file:  # with mode 600
        file.write(f"v1:{base64.b64encode(secrets.token_bytes(32)).decode()}\n")
        file.flush()
        os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(file.name, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
