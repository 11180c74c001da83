"""The settings of SSH connections."""

from __future__ import annotations

from typing import Any

from corral.plugin import Setting

CONNECT_SECONDS = Setting(
    name="ssh.connect_timeout_seconds",
    kind=int,
    default=10,
    minimum=1,
    maximum=60,
    title="The time limit for connecting to a machine and for its host key.",
)
LOGIN_SECONDS = Setting(
    name="ssh.login_timeout_seconds",
    kind=int,
    default=10,
    minimum=1,
    maximum=60,
    title="The time limit for the login on a machine.",
)
MAX_OUTPUT_BYTES = Setting(
    name="ssh.max_output_bytes",
    kind=int,
    default=1_048_576,
    minimum=65_536,
    maximum=16_777_216,
    title="The size of the output, and of the error output, at which a command is stopped.",
)
RETENTION_DAYS = Setting(
    name="ssh.execution_retention_days",
    kind=int,
    default=90,
    minimum=1,
    maximum=3650,
    title="The number of days for which executed commands are kept.",
)
ALL: tuple[Setting[Any], ...] = (CONNECT_SECONDS, LOGIN_SECONDS, MAX_OUTPUT_BYTES, RETENTION_DAYS)
