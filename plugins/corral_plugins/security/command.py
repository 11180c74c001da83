"""The command group `corral security`, which restores access after a lockout.

The commands must run on the same machine as the server.
"""

from __future__ import annotations

import json
from pathlib import Path

import click

from corral.plugin import OpenSession


@click.group("security")
def security_command() -> None:
    """Revert security settings that lock everybody out. Requires access to the data folder, but no token."""


@security_command.group("ip-rules")
def ip_rules_command() -> None:
    """Manage the rules that allow or block client addresses."""


@ip_rules_command.command("off")
@click.option("--config", "config_path", type=click.Path(dir_okay=False, path_type=Path), help="path to corral.toml")
@click.option("--json", "as_json", is_flag=True, help="print the result as JSON")
@click.pass_obj
def turn_off_ip_rules(open_session: OpenSession, config_path: Path | None, as_json: bool) -> None:
    """Turn the IP rules off. The rules are kept and apply again after an admin sets a mode."""
    from corral_plugins.security.service.ip_rules import IpRules

    with open_session(config_path, "security ip-rules off") as session:
        rules = session.service(IpRules)
        session.run(rules.turn_off)
    text = "The IP rules are off; a running server applies the change within 2 seconds."
    click.echo(json.dumps({"mode": "off"}) if as_json else text)
