"""The command `corral kill-switch`, which runs on the server's machine and needs no access token."""

from __future__ import annotations

import json
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


@click.group("kill-switch")
def kill_switch_command() -> None:
    """Stop all agent activity immediately, or resume it.

    The commands need no token: access to the data folder is sufficient. They ignore CORRAL_URL and CORRAL_TOKEN.
    """


@kill_switch_command.command("on")
@click.option("--reason", required=True, help="reason for the emergency stop; users whose tasks stop can see it")
@click.option("--cancel", is_flag=True, help="cancel running tasks instead of pausing them")
@click.option("--hold-deliveries", is_flag=True, help="hold back webhooks and notifications as well")
@config_option
@json_option
@click.pass_obj
def engage_kill_switch(
    open_session: OpenSession, reason: str, cancel: bool, hold_deliveries: bool, config_path: Path | None, as_json: bool
) -> None:
    """Engage the kill switch. Within 2 seconds, all processes stop claiming tasks and calling models and tools.

    The command needs no token: access to the data folder is sufficient. It ignores CORRAL_URL and CORRAL_TOKEN.
    """
    mode = "cancel" if cancel else "pause"
    facts = {"engaged": True, "mode": mode, "hold_deliveries": hold_deliveries, "reason": reason}
    _change_kill_switch(open_session, config_path, "kill-switch on", facts, as_json)


@kill_switch_command.command("off")
@config_option
@json_option
@click.pass_obj
def release_kill_switch(open_session: OpenSession, config_path: Path | None, as_json: bool) -> None:
    """Release the kill switch. Work resumes automatically.

    The command needs no token: access to the data folder is sufficient. It ignores CORRAL_URL and CORRAL_TOKEN.
    """
    _change_kill_switch(open_session, config_path, "kill-switch off", {"engaged": False}, as_json)


def _change_kill_switch(
    open_session: OpenSession, config_path: Path | None, label: str, facts: dict[str, Any], as_json: bool
) -> None:
    from corral_plugins.admin.service.kill_switch import KillSwitchChange, KillSwitchService

    try:
        change = msgspec.convert(facts, KillSwitchChange)
    except msgspec.ValidationError as error:
        raise click.UsageError(str(error)) from None
    with open_session(config_path, label) as session:
        switch = session.service(KillSwitchService)
        state = session.run(lambda: switch.change(change, by=session.caller))
    if as_json:
        click.echo(json.dumps(msgspec.to_builtins(state), indent=2))
    else:
        click.echo(f"The kill switch is {'engaged: ' + str(state.reason) if state.engaged else 'released'}.")
