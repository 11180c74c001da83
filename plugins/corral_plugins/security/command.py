"""`corral security`: the way back in, for whoever may read the data folder."""

from __future__ import annotations

from pathlib import Path

import click

from corral.plugin import OpenSession


@click.group("security")
def command() -> None:
    """What may lock everybody out, without a token: whoever may read the data folder may do this."""


@command.group("ip-rules")
def ip_rules() -> None:
    """Rules about networks."""


@ip_rules.command("off")
@click.option("--config", "config_path", type=click.Path(dir_okay=False, path_type=Path), help="corral.toml to read")
@click.pass_obj
def off(open_session: OpenSession, config_path: Path | None) -> None:
    """Have no rule count any more; they stay, and count again once an admin sets a mode."""
    from corral_plugins.security.service.ip_rules import IpRules

    with open_session(config_path, "security ip-rules off") as session:
        rules = session.service(IpRules)
        session.run(rules.turn_off)
    click.echo("The IP rules do not count any more; a running server follows within 2 seconds.")
