"""The commands of the README, typed as it shows them."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

from conftest import serving
from recorded_github import TOKEN, WEBHOOK_SECRET, RecordedGitHub

from corral.testing.command_line import run_corral
from corral.testing.server import ServerProcess

README = Path(__file__).parents[1] / "README.md"
SET_UP = ("pip install", "corral plugins enable")


class Shell:
    """Types commands as the admin of a server, in a folder with the files that the README names."""

    def __init__(self, folder: Path, server: ServerProcess) -> None:
        self._folder = folder
        token = server.sign_in().headers["Authorization"].removeprefix("Bearer ")
        self._environ = {**server.environ, "CORRAL_URL": server.address, "CORRAL_TOKEN": token, "COLUMNS": "240"}
        for name, text in (("token.txt", TOKEN), ("webhook.txt", WEBHOOK_SECRET)):
            (folder / name).write_text(text)

    def type(self, *arguments: str, status: int = 0) -> str:
        done = run_corral(*arguments, environ=self._environ, folder=self._folder)
        assert done.exit_code == status, done.output
        return done.output

    def json(self, *arguments: str) -> Any:
        return json.loads(self.type(*arguments, "--json"))


def test_the_commands_of_the_readme(tmp_path: Path, github: RecordedGitHub) -> None:
    commands = re.findall(r"^\$ (.*?)(?: +#.*)?$", README.read_text("utf-8"), re.MULTILINE)
    typed = [shlex.split(each)[1:] for each in commands if not each.startswith(SET_UP)]
    printed = {}
    with serving(tmp_path) as server:
        shell = Shell(tmp_path, server)
        shell.type("agents", "create", "author")
        assert "No repository is connected" in shell.type("github", "list")
        assert "nothing to change; give --input or --field" in shell.type("github", "edit", "octo/hello", status=2)
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
    assert re.search(r"^state: +untried$", printed["show"], re.MULTILINE)  # nothing has asked the host yet
    assert "Nothing was delivered" in printed["deliveries"]
    assert "Nothing was posted" in printed["posts"]
    assert "disabled" in printed["edit"]
    assert "0 deliveries and 0 posts" in printed["retry"]
    assert "disconnected" in printed["remove"]
