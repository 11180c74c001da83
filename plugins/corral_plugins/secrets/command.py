"""`corral secrets`: the master keys, on the machine itself, beside a running server or without one."""

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
    "--config", "config_path", type=click.Path(dir_okay=False, path_type=Path), help="corral.toml to read"
)
json_option = click.option("--json", "as_json", is_flag=True, help="print JSON")


@click.group("secrets")
def command() -> None:
    """Master keys and encrypted values, without a token: whoever may read the data folder may do this."""


@command.command("key-status")
@config_option
@json_option
@click.pass_obj
def key_status(open_session: OpenSession, config_path: Path | None, as_json: bool) -> None:
    """Show the master keys and how many encrypted rows need each. Ends with 1 when the vault is sealed."""
    from corral_plugins.secrets.service.keys import MasterKeys

    with open_session(config_path, "secrets key-status") as session:
        status = session.run(session.service(MasterKeys).status, read=True)
    lines = ["The vault is sealed: no loaded key opens the stored values."] if status.sealed else []
    for key in status.keys:
        active = ", active" if key.key_id == status.active_key else ""
        loaded = f"{key.label}{active}" if key.label else "NOT LOADED"
        lines.append(f"{key.key_id}  {key.rows:>8} rows  {loaded}")
    lines.append(f"{status.remaining} rows are not under the active key.")
    _print(msgspec.to_builtins(status), lines, as_json)
    sys.exit(1 if status.sealed else 0)


@command.command("rotate-master-key")
@config_option
@json_option
@click.pass_obj
def rotate_master_key(open_session: OpenSession, config_path: Path | None, as_json: bool) -> None:
    """Give every encrypted row the active master key, the first of CORRAL_MASTER_KEY. A second run goes on."""
    from corral_plugins.secrets.service.keys import MasterKeys

    with open_session(config_path, "secrets rotate-master-key") as session:
        keys = session.service(MasterKeys)
        rows, holder = session.run(keys.begin)
        asyncio.run(keys.run(holder, seconds=math.inf))
        left = session.run(keys.status, read=True).remaining
    told = f"{rows - left} rows were given the active key, {left} are left."
    if left:
        told += " Their keys are not loaded, or they were changed: corral secrets verify."
    _print({"rewrapped": rows - left, "remaining": left}, [told], as_json)
    sys.exit(1 if left else 0)


@command.command("verify")
@config_option
@json_option
@click.pass_obj
def verify(open_session: OpenSession, config_path: Path | None, as_json: bool) -> None:
    """Try every encrypted row: whether its master key is loaded and opens it; of secrets the value too."""
    from corral_plugins.secrets.service.keys import MasterKeys
    from corral_plugins.secrets.service.values import Values

    with open_session(config_path, "secrets verify") as session:
        found = session.service(MasterKeys).unreadable(lambda fn: session.run(fn, read=True))
        damaged = _damaged(session.service(Values), session)
    wrong = {name: count for name, count in found.items() if count}
    lines = [f"{name}: {count} rows do not open" for name, count in wrong.items()]
    lines += [f"secret {name}: the value was changed or belongs elsewhere" for name in damaged]
    _print({"unreadable": wrong, "damaged": damaged}, lines or ["Every encrypted row opens."], as_json)
    sys.exit(1 if wrong or damaged else 0)


def _damaged(values: Any, session: Any) -> list[str]:
    """Names of secrets some of whose values do not open where they lie, though their keys are here."""
    found: set[str] = set()
    after = ""
    while rows := session.run(lambda after=after: values.after(after), read=True):
        found |= {str(row.name) for row in rows if values.is_damaged(row)}
        after = rows[-1].id
    return sorted(found)


def _print(found: Any, lines: list[str], as_json: bool) -> None:
    click.echo(json.dumps(found, indent=2) if as_json else "\n".join(lines))
