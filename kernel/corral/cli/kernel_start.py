"""Boots the kernel of a process that serves requests or runs jobs, with the log of the process."""

from __future__ import annotations

from typing import TYPE_CHECKING

from corral.cli import logging_setup
from corral.cli.damaged_database import damage_named
from corral.cli.processes import ProcessEnvironment
from corral.cli.sealed_start import log_sealed_start
from corral.config.model import Config

if TYPE_CHECKING:
    from corral.kernel import Kernel
    from corral.plugins.discovery import Found


def boot_with_log(config: Config, environment: ProcessEnvironment, *, start_secret: bytes = b"") -> Kernel:
    """Boot a kernel whose plugins have a limited share of the log, from their import on.

    Plugins may change the environment and the logging while they are loaded, so both are restored afterwards.
    """
    from corral.kernel import boot
    from corral.plugins.discovery import discover

    loaded: list[Found] = []
    limit = logging_setup.LogRateLimit(lambda: loaded or discover(config))
    logging_setup.limit_log_rate(limit)
    with damage_named(config):
        kernel = boot(config, start_secret=start_secret)
    loaded += [record.found for record in kernel.plugins]
    log_sealed_start(kernel.keyring)
    environment.restore()
    logging_setup.configure(config.log_level, config.log_format)
    logging_setup.redact_with(kernel.redactor)
    logging_setup.limit_log_rate(limit)
    return kernel
