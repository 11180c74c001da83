"""The `corral secrets` commands, which manage the master keys on the server, even if Corral is not running."""

from __future__ import annotations

import asyncio
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

if TYPE_CHECKING:
    from corral.plugin import OpenSession

config_option = click.option(
    "--config", "config_path", type=click.Path(dir_okay=False, path_type=Path), help="path to corral.toml"
)
json_option = click.option("--json", "as_json", is_flag=True, help="print the result as JSON")


@click.group("secrets")
def secrets_command() -> None:
    """Manage master keys and encrypted values. Requires access to the data folder, but no token."""


@secrets_command.command("key-status")
@config_option
@json_option
@click.pass_obj
def key_status(open_session: OpenSession, config_path: Path | None, as_json: bool) -> None:
    """Show the master keys and the number of rows encrypted under each. The exit status is 1 if the vault is sealed."""
    from corral_plugins.secrets.service.master_key_rotation import MasterKeyRotation

    with open_session(config_path, "secrets key-status") as session:
        status = session.run(session.service(MasterKeyRotation).key_status, read=True)
    lines = ["The vault is sealed: no loaded key decrypts the stored values."] if status.sealed else []
    for key in status.keys:
        active = ", active" if key.key_id == status.active_key else ""
        loaded = f"{key.label}{active}" if key.label else "NOT LOADED"
        lines.append(f"{key.key_id}  {key.rows:>8} rows  {loaded}")
    lines.append(f"{status.remaining} rows are not encrypted under the active key.")
    _print_result(msgspec.to_builtins(status), lines, as_json)
    sys.exit(1 if status.sealed else 0)


@secrets_command.command("rotate-master-key")
@config_option
@json_option
@click.pass_obj
def rotate_master_key(open_session: OpenSession, config_path: Path | None, as_json: bool) -> None:
    """Rewrap every encrypted row under the active master key, which is the first key in CORRAL_MASTER_KEY.

    If the command is interrupted, run it again to continue with the remaining rows.
    """
    from corral_plugins.secrets.service.master_key_rotation import MasterKeyRotation

    with open_session(config_path, "secrets rotate-master-key") as session:
        keys = session.service(MasterKeyRotation)
        rows, holder = session.run(keys.begin_rotation)
        asyncio.run(keys.rewrap_rows(holder, seconds=math.inf))
        left = session.run(keys.key_status, read=True).remaining
    message = f"{rows - left} rows were re-encrypted under the active key; {left} remain."
    if left:
        message += " Their keys are not loaded, or the rows are damaged. Run: corral secrets verify"
    _print_result({"rewrapped": rows - left, "remaining": left}, [message], as_json)
    sys.exit(1 if left else 0)


@secrets_command.command("verify")
@config_option
@json_option
@click.pass_obj
def verify_values(open_session: OpenSession, config_path: Path | None, as_json: bool) -> None:
    """Verify that every encrypted row can be opened with a loaded master key, and that all values can be decrypted."""
    from corral_plugins.secrets.service.master_key_rotation import MasterKeyRotation
    from corral_plugins.secrets.service.values import SecretValues

    with open_session(config_path, "secrets verify") as session:
        found = session.service(MasterKeyRotation).count_unreadable_values(lambda fn: session.run(fn, read=True))
        damaged = _damaged_secrets(session.service(SecretValues), session)
    wrong = {name: count for name, count in found.items() if count}
    lines = [f"{name}: {count} rows cannot be decrypted" for name, count in wrong.items()]
    lines += [f"secret {name}: the value is damaged or belongs to another secret" for name in damaged]
    _print_result({"unreadable": wrong, "damaged": damaged}, lines or ["All encrypted rows can be decrypted."], as_json)
    sys.exit(1 if wrong or damaged else 0)


def _damaged_secrets(values: Any, session: Any) -> list[str]:
    """Return the names of secrets whose values cannot be decrypted although their master key is loaded."""
    found: set[str] = set()
    after = ""
    while rows := session.run(lambda after=after: values.versions_after(after), read=True):
        found |= {str(row.name) for row in rows if values.is_damaged(row)}
        after = rows[-1].id
    return sorted(found)


def _print_result(found: Any, lines: list[str], as_json: bool) -> None:
    click.echo(json.dumps(found, indent=2) if as_json else "\n".join(lines))
