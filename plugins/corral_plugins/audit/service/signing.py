"""Signs the canonical JSON of checkpoints with Ed25519. The package `cryptography` is imported on first use."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence

import msgspec

PREFIX = b"corral.audit.checkpoint.v1"
PUBLIC_KEY_BYTES = 32


class SignedFields(msgspec.Struct, frozen=True, kw_only=True):
    """The signed content of a checkpoint. Its fields are in alphabetical order, as canonical JSON requires."""

    hash: str
    key_id: str
    rows: int
    seq: int
    ts: str

    def signed_bytes(self) -> bytes:
        """Return the bytes to sign."""
        return PREFIX + msgspec.json.encode(self)


class SignedCheckpoint(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint that covers the log up to row `seq`.

    `rows` is the number of rows since the previous checkpoint. `signature` is encoded in base64.
    """

    seq: int
    hash: str
    rows: int
    ts: str
    signature: str
    key_id: str

    def signed(self) -> SignedFields:
        """Return the content that the signature covers."""
        return SignedFields(hash=self.hash, key_id=self.key_id, rows=self.rows, seq=self.seq, ts=self.ts)


class ExternalCheckpoints(msgspec.Struct, frozen=True):
    """Checkpoints saved outside the database, and the trusted public keys.

    If `public_keys` is empty, the keys in the database are trusted.
    """

    checkpoints: Sequence[SignedCheckpoint] = ()
    public_keys: Sequence[str] = ()

    def between(self, after: int, until: int) -> dict[int, SignedCheckpoint]:
        """Return the checkpoints with `after < seq <= until`, keyed by `seq`."""
        return {each.seq: each for each in self.checkpoints if after < each.seq <= until}


def key_id_of(public_key: bytes) -> str:
    """Return the id of a public key, derived from its bytes."""
    return hashlib.sha256(public_key).hexdigest()[:16]


def decode_public_key(text: str) -> bytes | None:
    """Decode a public key from base64. Return None if the text is not a public key of 32 bytes."""
    try:
        key = base64.b64decode(text, validate=True)
    except ValueError:
        return None
    return key if len(key) == PUBLIC_KEY_BYTES else None


def generate_key() -> tuple[bytes, bytes]:
    """Generate a key pair. Return the private key and the public key, each of 32 bytes."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.generate()
    return key.private_bytes_raw(), key.public_key().public_bytes_raw()


def sign_checkpoint(private_key: bytes, signed: SignedFields) -> str:
    """Sign the content of a checkpoint. Return the signature in base64."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    return base64.b64encode(Ed25519PrivateKey.from_private_bytes(private_key).sign(signed.signed_bytes())).decode()


class PublicKeys:
    """A set of trusted public keys."""

    def __init__(self, encoded: Sequence[str]) -> None:
        keys = [key for text in encoded if (key := decode_public_key(text)) is not None]
        self._keys = {key_id_of(key): key for key in keys}

    def verify_signature(self, checkpoint: SignedCheckpoint) -> bool:
        """Return whether the signature of a checkpoint is valid and was created by one of the trusted keys."""
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

        key = self._keys.get(checkpoint.key_id)
        if key is None:
            return False
        try:
            signature = base64.b64decode(checkpoint.signature, validate=True)
            Ed25519PublicKey.from_public_bytes(key).verify(signature, checkpoint.signed().signed_bytes())
        except (InvalidSignature, ValueError):
            return False
        return True
