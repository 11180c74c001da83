"""The command `corral`. Commands are imported when they are called: `corral --version` loads nothing else."""

from __future__ import annotations

import gc
import sys

# name -> (module, one line of help); plugins add theirs with `corral_commands`
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
    """Run the command line; exits with 0 done, 1 failed, 2 usage, 3 refused to start, 4 migrations."""
    if sys.argv[1:] == ["--version"]:
        from importlib.metadata import version

        print(f"corral {version('corral')}")
        return
    gc.set_threshold(20_000, 20, 20)  # what a start makes stays: looking for garbage in it would take a tenth of it
    from corral.cli.commands import run

    run()
