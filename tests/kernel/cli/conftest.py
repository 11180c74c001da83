"""The `corral` command in a process of its own, in an empty folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tests.kernel.cli.warm import warm

from corral.testing.plugin_folder import PluginFolder


class Done:
    """How a command ended."""

    def __init__(self, process: subprocess.CompletedProcess[str]) -> None:
        self.status, self.out, self.err = process.returncode, process.stdout, process.stderr

    def json(self) -> Any:
        """Standard output, parsed."""
        return json.loads(self.out)

    def __repr__(self) -> str:
        return f"<{self.status}\n{self.out}\n{self.err}>"


class Command:
    """`corral("user", "list")` in the folder `home`; no `CORRAL_*` of the outer environment counts.

    The process is a fork of one that has imported what commands do; `anew` starts one that has nothing.
    """

    def __init__(self, home: Path) -> None:
        self.home = home
        self.environ = {name: value for name, value in os.environ.items() if not name.startswith("CORRAL_")}
        self.environ["COLUMNS"] = "200"
        self.plugins = PluginFolder(home / "plugins")

    def __call__(self, *arguments: str, stdin: str = "", environ: Mapping[str, str] | None = None) -> Done:
        process = warm().run(arguments, cwd=self.home, environ={**self.environ, **(environ or {})}, stdin=stdin)
        return Done(process)

    def anew(self, *arguments: str, stdin: str = "", environ: Mapping[str, str] | None = None) -> Done:
        """The same by `python -m corral`."""
        process = subprocess.run(
            [sys.executable, "-m", "corral", *arguments],
            cwd=self.home,
            input=stdin,
            text=True,
            capture_output=True,
            env={**self.environ, **(environ or {})},
            timeout=120,
            check=False,
        )
        return Done(process)

    def configure(self, text: str) -> Path:
        """Write corral.toml."""
        path = self.home / "corral.toml"
        path.write_text(text, "utf-8")
        return path


@pytest.fixture
def corral(tmp_path: Path) -> Command:
    return Command(tmp_path)


@pytest.fixture
def served(corral: Any) -> Any:
    """An installation whose data folder, key and database exist."""
    corral.environ["CORRAL_DATA_DIR"] = str(corral.home / "data")
    assert corral("migrate").status == 0
    made = corral("user", "list")
    assert made.status == 0, made
    return corral
