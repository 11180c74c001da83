"""The commands of the README, typed as it shows them."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from recorded_github import TOKEN, WEBHOOK_SECRET, RecordedGitHub

from corral.testing.server import EMAIL, PASSWORD, ServerProcess

README = Path(__file__).parents[1] / "README.md"
SET_UP = ("pip install", "corral plugins enable")


class Shell:
    """Types commands as the admin of a server, in a folder with the files that the README names."""

    def __init__(self, folder: Path, server: ServerProcess) -> None:
        self._folder = folder
        self._environ = {**server.environ, "XDG_CONFIG_HOME": str(folder / "home"), "COLUMNS": "240"}
        for name, text in (("password", PASSWORD), ("token.txt", TOKEN), ("webhook.txt", WEBHOOK_SECRET)):
            (folder / name).write_text(text)
        self.type("login", server.address, "--email", EMAIL, "--password-file", "password")

    def type(self, *arguments: str, status: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "corral", *arguments],
            env={**os.environ, **self._environ},
            cwd=self._folder,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    def json(self, *arguments: str) -> Any:
        return json.loads(self.type(*arguments, "--json"))


def test_the_commands_of_the_readme(tmp_path: Path, github: RecordedGitHub) -> None:
    commands = re.findall(r"^\$ (.*?)(?: +#.*)?$", README.read_text("utf-8"), re.MULTILINE)
    typed = [shlex.split(each)[1:] for each in commands if not each.startswith(SET_UP)]
    config = tmp_path / "corral.toml"
    config.write_text('[plugins]\nenabled = ["github"]\n')
    environ = {"CORRAL_EGRESS_ALLOW": "127.0.0.1", "CORRAL_CONFIG": str(config)}
    printed = {}
    with ServerProcess(tmp_path, environ=environ) as server:
        shell = Shell(tmp_path, server)
        shell.type("agents", "create", "author")
        assert "No repository is connected" in shell.type("github", "list")
        for arguments in typed:
            local = ["--api-url", github.url] if arguments[:2] == ["github", "add"] else []
            printed[arguments[1]] = shell.type(*arguments, *local)
        assert "No repository is connected" in shell.type("github", "list")
        assert shell.json("github", "list") == {"items": []}
        assert "there is no repository named octo/hello" in shell.type("github", "show", "octo/hello", status=1)
    assert {each[1] for each in typed} == {
        *("POST", "add", "list", "show", "deliveries", "posts", "edit", "retry", "remove")
    }
    assert f"{server.address}/api/v1/github/hooks/" in printed["add"]
    assert "octo/hello" in printed["list"]
    assert "Nothing was delivered" in printed["deliveries"]
    assert "Nothing was posted" in printed["posts"]
    assert "disabled" in printed["edit"]
    assert "0 deliveries and 0 posts" in printed["retry"]
    assert "disconnected" in printed["remove"]
