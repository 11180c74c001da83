"""Settings of the `ssh` plugin."""

from __future__ import annotations

from typing import Any

from corral.plugin import Setting

CONNECT_SECONDS = Setting(
    name="ssh.connect_timeout_seconds",
    kind=int,
    default=10,
    minimum=1,
    maximum=60,
    title="Time limit for connecting to a machine and receiving its host key, in seconds",
)
LOGIN_SECONDS = Setting(
    name="ssh.login_timeout_seconds",
    kind=int,
    default=10,
    minimum=1,
    maximum=60,
    title="Time limit for the login on a machine, in seconds",
)
MAX_OUTPUT_BYTES = Setting(
    name="ssh.max_output_bytes",
    kind=int,
    default=1_048_576,
    minimum=65_536,
    maximum=16_777_216,
    title="Size of the output or of the error output at which a command is stopped, in bytes",
)
RETENTION_DAYS = Setting(
    name="ssh.execution_retention_days",
    kind=int,
    default=90,
    minimum=1,
    maximum=3650,
    title="Days for which the records of executed commands are kept",
)
ALL: tuple[Setting[Any], ...] = (CONNECT_SECONDS, LOGIN_SECONDS, MAX_OUTPUT_BYTES, RETENTION_DAYS)
