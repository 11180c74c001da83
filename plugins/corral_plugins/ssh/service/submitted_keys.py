"""Reads private keys and host keys that users submit. Decrypting a key takes time, so it runs in a thread."""

from __future__ import annotations

import asyncio

from corral.errors import Invalid

MIN_RSA_BITS = 2048
REFUSED_TYPES = ("ssh-dss",)


async def check_private_key(private_key: str, passphrase: str | None) -> None:
    """Raise `Invalid` if a private key cannot be read, needs a different passphrase, or is too weak."""
    await asyncio.to_thread(_check_private_key, private_key, passphrase)


async def normalize_host_key(key_line: str) -> str:
    """Return a host key as an OpenSSH public key line without a comment. Raise `Invalid` if it cannot be read."""
    return await asyncio.to_thread(_normalize_host_key, key_line)


def _check_private_key(private_key: str, passphrase: str | None) -> None:
    import asyncssh

    try:
        key = asyncssh.import_private_key(private_key, passphrase)
    except asyncssh.KeyEncryptionError:
        raise Invalid.at("/passphrase", "invalid_value", "The passphrase does not match the private key.") from None
    except (asyncssh.KeyImportError, ValueError) as error:
        if passphrase is None and "assphrase" in str(error):
            raise Invalid.at("/passphrase", "required", "The private key is encrypted; send its passphrase.") from None
        detail = "This is not a private key in OpenSSH or PEM format."
        raise Invalid.at("/private_key", "invalid_value", detail) from None
    _refuse_weak(key, "/private_key")


def _normalize_host_key(key_line: str) -> str:
    import asyncssh

    try:
        key = asyncssh.import_public_key(key_line)
    except (asyncssh.KeyImportError, ValueError):
        detail = (
            "This is not an OpenSSH public key line; `ssh-keyscan` and /etc/ssh/ssh_host_*_key.pub show such lines."
        )
        raise Invalid.at("/host_key", "invalid_value", detail) from None
    _refuse_weak(key, "/host_key")
    return " ".join(key.export_public_key().decode().split()[:2])


def _refuse_weak(key: object, pointer: str) -> None:
    algorithm = key.get_algorithm()  # type: ignore[attr-defined]  # asyncssh.SSHKey, which is imported on first use
    bits = getattr(getattr(key, "pyca_key", None), "key_size", None)
    if algorithm in REFUSED_TYPES:
        raise Invalid.at(pointer, "not_allowed", "DSA keys are too weak; use an Ed25519 key.")
    if algorithm == "ssh-rsa" and (bits is None or bits < MIN_RSA_BITS):
        detail = f"RSA keys need at least {MIN_RSA_BITS} bits; use an Ed25519 key."
        raise Invalid.at(pointer, "not_allowed", detail)
