"""Host keys in the form of OpenSSH public key lines, and their fingerprints in the format of `ssh-keygen -lf`."""

from __future__ import annotations

import base64
import hashlib


def fingerprint_of(key_line: str | None) -> str | None:
    """Return the SHA-256 fingerprint of a public key line, or None if there is no key."""
    if key_line is None:
        return None
    digest = hashlib.sha256(base64.b64decode(key_line.split()[1])).digest()
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


def key_type_of(key_line: str) -> str:
    """Return the type of the key, such as `ssh-ed25519`."""
    return key_line.split()[0]
