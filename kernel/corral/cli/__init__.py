"""The command line `corral`. A command's module is imported only when the command is called."""

from __future__ import annotations

import gc
import sys

# name -> (module, one line of help); plugins add commands with the hook `corral_commands`
COMMANDS = {
    "serve": ("corral.cli.serve", "Serve the API, jobs and an embedded worker"),
    "jobs": ("corral.cli.jobs", "Run background jobs and schedules only"),
    "migrate": ("corral.cli.migrate", "Apply pending migrations"),
    "doctor": ("corral.cli.doctor", "Check this installation and say what to do"),
    "config": ("corral.cli.config", "Show, check or write the configuration"),
    "plugins": ("corral.cli.plugins", "List, show, enable, disable or purge plugins"),
    "check": ("corral.cli.check", "Verify a plugin against the contract"),
    "new-plugin": ("corral.cli.new_plugin", "Write the distribution of a new plugin"),
    "openapi": ("corral.cli.openapi", "Print the OpenAPI document"),
}


def main() -> None:
    """Run the command line and exit.

    Exit statuses: 0 success, 1 failure, 2 wrong usage, 3 refused to start, 4 migrations are pending or newer than the
    code.
    """
    if sys.argv[1:] == ["--version"]:
        from importlib.metadata import version

        print(f"corral {version('corral')}")
        return
    gc.set_threshold(20_000, 20, 20)  # objects of a start are kept: collecting them would take 10% of it
    from corral.cli.commands import run

    run()
