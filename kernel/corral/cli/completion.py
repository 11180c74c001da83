"""`corral completion`: prints the script that makes a shell complete commands, options and names."""

from __future__ import annotations

import click
from click.shell_completion import BashComplete, FishComplete, ZshComplete


class QuotingBashComplete(BashComplete):
    """Tab completion for bash that quotes names with spaces. The other shells do this automatically."""

    source_template = BashComplete.source_template.replace(
        "COMPREPLY+=($value)", 'COMPREPLY+=("$(printf %%q "$value")")'
    )


SHELLS = {"bash": QuotingBashComplete, "zsh": ZshComplete, "fish": FishComplete}


@click.command("completion")
@click.argument("shell", type=click.Choice(list(SHELLS)))
@click.pass_context
def completion_command(context: click.Context, shell: str) -> None:
    """Print the tab completion script for a shell. Agent names are completed too.

    \b
    bash: corral completion bash > ~/.local/share/bash-completion/completions/corral
    zsh:  corral completion zsh > "${fpath[1]}/_corral"
    fish: corral completion fish > ~/.config/fish/completions/corral.fish
    """
    click.echo(SHELLS[shell](context.find_root().command, {}, "corral", "_CORRAL_COMPLETE").source())
