"""`corral audit`."""

from __future__ import annotations

import click


@click.group("audit")
def command() -> None:
    """The audit log, offline: a copy of the database, or an export."""
