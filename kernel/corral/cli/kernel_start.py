"""Boots the kernel of a process that serves requests or runs jobs, and sets up logging for the process."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from corral.cli import logging_setup
from corral.cli.damaged_database import explain_damage
from corral.cli.processes import ProcessEnvironment
from corral.config.model import Config
from corral.crypto import Keyring

if TYPE_CHECKING:
    from corral.kernel import Kernel
    from corral.plugins.discovery import Found

log = logging.getLogger("corral.serve")


def boot_with_log(config: Config, environment: ProcessEnvironment, *, start_secret: bytes = b"") -> Kernel:
    """Boot a kernel. Limit how much each plugin may log, including during its import.

    Plugins may change the environment and the logging configuration while they are loaded, so both are restored
    afterwards.
    """
    from corral.kernel import boot
    from corral.plugins.discovery import discover

    loaded: list[Found] = []
    limit = logging_setup.LogRateLimit(lambda: loaded or discover(config))
    logging_setup.limit_log_rate(limit)
    with explain_damage(config):
        kernel = boot(config, start_secret=start_secret)
    loaded += [record.found for record in kernel.plugins]
    if kernel.keyring.sealed:
        log.error("the vault is sealed", extra={"reason": sealed_reason(kernel.keyring)})
    environment.restore()
    logging_setup.configure(config.log_level, config.log_format)
    logging_setup.redact_with(kernel.redactor)
    logging_setup.limit_log_rate(limit)
    return kernel


def sealed_reason(keyring: Keyring) -> str:
    """Explain why the vault is sealed, and state the remedy."""
    if keyring.keys:
        wrong = f"the master key in {keyring.source} is not the one that encrypted the stored values"
    else:
        wrong = f"no master key: {keyring.source} does not exist and CORRAL_MASTER_KEY is not set"
    remedy = "set CORRAL_MASTER_KEY to the master key of this installation, or restore its key file, and restart"
    return f"SEALED: {wrong}; {remedy}"
