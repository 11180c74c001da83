"""Runs the `corral` program in the test's own process, which saves the second that a new process takes to start."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from pathlib import Path
from unittest.mock import patch

import click
from click.testing import CliRunner, Result

from corral.cli.commands import run


def run_corral(*arguments: str, environ: Mapping[str, str], folder: Path) -> Result:
    """Run `corral` with these arguments in a folder, and return its `exit_code`, `stdout`, `stderr` and `output`.

    Use this function only for commands that boot no kernel, such as those that call a server. `environ` is added to the
    environment. Exceptions that the program itself does not handle propagate to the caller.
    """
    with patch.object(sys, "argv", ["corral", *arguments]), contextlib.chdir(folder):
        return CliRunner().invoke(click.command()(run), [], env=environ, catch_exceptions=False)
