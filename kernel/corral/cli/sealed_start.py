"""Tells the operator why a server starts with a sealed vault, and what to do."""

from __future__ import annotations

import logging

from corral.crypto import Keyring

log = logging.getLogger("corral.serve")


def sealed_reason(keyring: Keyring) -> str:
    """Return why the vault is sealed, and the remedy."""
    if keyring.keys:
        wrong = f"the master key in {keyring.source} is not the one that encrypted the stored values"
    else:
        wrong = f"no master key: {keyring.source} does not exist and CORRAL_MASTER_KEY is not set"
    remedy = "set CORRAL_MASTER_KEY to the master key of this installation, or restore its key file, and restart"
    return f"SEALED: {wrong}; {remedy}"


def log_sealed_start(keyring: Keyring) -> None:
    """Log an error if the vault is sealed."""
    if keyring.sealed:
        log.error("the vault is sealed", extra={"reason": sealed_reason(keyring)})
