"""The command-line program `corral`. The module of a command is imported only when that command is run."""

from __future__ import annotations

import gc
import sys

# name -> (module, one line of help); plugins add commands with the `corral_commands` hook
COMMANDS = {
    "serve": ("corral.cli.serve", "Start the server: API, background jobs and embedded worker."),
    "jobs": ("corral.cli.jobs", "Run background jobs and schedules without the API."),
    "migrate": ("corral.cli.migrate", "Apply pending database migrations."),
    "doctor": ("corral.cli.doctor", "Check the installation and suggest remedies."),
    "config": ("corral.cli.config", "Show, check or write the configuration."),
    "plugins": ("corral.cli.plugins", "List, show, enable, disable or purge plugins."),
    "check": ("corral.cli.check", "Check a plugin against the plugin contract."),
    "new-plugin": ("corral.cli.new_plugin", "Create the source tree of a new plugin."),
    "openapi": ("corral.cli.openapi", "Print the OpenAPI document."),
    "api": ("corral.cli.api", "Call any operation of the API."),
    "completion": ("corral.cli.completion", "Print the tab completion for a shell."),
}


def main() -> None:
    """Run the command line and exit.

    The exit status is 0 on success, 1 on failure, 2 for incorrect usage, 3 if the server refuses to start, and 4 if
    migrations are pending or the database schema is newer than the code.
    """
    if sys.argv[1:] == ["--version"]:
        from importlib.metadata import version

        print(f"corral {version('corral')}")
        return
    gc.set_threshold(20_000, 20, 20)  # the objects of a start are kept; collecting garbage would take 10% of its time
    try:
        from corral.cli.commands import run

        run()
    except KeyboardInterrupt:
        sys.exit(130)
