"""Signatures of checkpoints: Ed25519 over the checkpoint's canonical JSON. `cryptography` is imported at first use."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence

import msgspec

PREFIX = b"corral.audit.checkpoint.v1"
PUBLIC_KEY_BYTES = 32


class Signed(msgspec.Struct, frozen=True, kw_only=True):
    """What is signed; its fields are in alphabetical order, as canonical JSON wants them."""

    hash: str
    key_id: str
    rows: int
    seq: int
    ts: str

    def message(self) -> bytes:
        """The bytes under the signature."""
        return PREFIX + msgspec.json.encode(self)


class SignedCheckpoint(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint: the log up to `seq`, of which `rows` are new since the one before it. `signature` is base64."""

    seq: int
    hash: str
    rows: int
    ts: str
    signature: str
    key_id: str

    def signed(self) -> Signed:
        """What the signature is of."""
        return Signed(hash=self.hash, key_id=self.key_id, rows=self.rows, seq=self.seq, ts=self.ts)


class Kept(msgspec.Struct, frozen=True):
    """Checkpoints that were kept outside the database, and the keys that are trusted (none: those in the database)."""

    checkpoints: Sequence[SignedCheckpoint] = ()
    public_keys: Sequence[str] = ()

    def between(self, after: int, until: int) -> dict[int, SignedCheckpoint]:
        """Those with `after < seq <= until`."""
        return {each.seq: each for each in self.checkpoints if after < each.seq <= until}


def key_id_of(public_key: bytes) -> str:
    """The name of a key, made from the key."""
    return hashlib.sha256(public_key).hexdigest()[:16]


def public_key_of(text: str) -> bytes | None:
    """The key of its base64; None: it is none, so nothing is signed by it."""
    try:
        key = base64.b64decode(text, validate=True)
    except ValueError:
        return None
    return key if len(key) == PUBLIC_KEY_BYTES else None


def generate() -> tuple[bytes, bytes]:
    """A new private key and its public half, 32 bytes each."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.generate()
    return key.private_bytes_raw(), key.public_key().public_bytes_raw()


def sign(private_key: bytes, signed: Signed) -> str:
    """The signature in base64."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    return base64.b64encode(Ed25519PrivateKey.from_private_bytes(private_key).sign(signed.message())).decode()


class PublicKeys:
    """Keys by id, from their base64."""

    def __init__(self, encoded: Sequence[str]) -> None:
        keys = [key for text in encoded if (key := public_key_of(text)) is not None]
        self._keys = {key_id_of(key): key for key in keys}

    def confirm(self, checkpoint: SignedCheckpoint) -> bool:
        """Whether one of these keys signed it as it is."""
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

        key = self._keys.get(checkpoint.key_id)
        if key is None:
            return False
        try:
            signature = base64.b64decode(checkpoint.signature, validate=True)
            Ed25519PublicKey.from_public_bytes(key).verify(signature, checkpoint.signed().message())
        except (InvalidSignature, ValueError):
            return False
        return True
