"""The command line `corral`. A command's module is imported only when the command is called."""

from __future__ import annotations

import gc
import sys

# name -> (module, one line of help); plugins add commands with the hook `corral_commands`
COMMANDS = {
    "serve": ("corral.cli.serve", "Start the server: API, background jobs and embedded worker"),
    "jobs": ("corral.cli.jobs", "Run background jobs and schedules without the API"),
    "migrate": ("corral.cli.migrate", "Apply pending database migrations"),
    "doctor": ("corral.cli.doctor", "Check the installation and suggest remedies"),
    "config": ("corral.cli.config", "Show, check or write the configuration"),
    "plugins": ("corral.cli.plugins", "List, show, enable, disable or purge plugins"),
    "check": ("corral.cli.check", "Check a plugin against the plugin contract"),
    "new-plugin": ("corral.cli.new_plugin", "Create the source tree of a new plugin"),
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
    gc.set_threshold(20_000, 20, 20)  # the objects of a start are kept; collecting garbage would take 10% of its time
    from corral.cli.commands import run

    run()
