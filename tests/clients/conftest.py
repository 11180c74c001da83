"""A running Corral with scripted models, and the scripts of its clients, each run in a process of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from corral.testing.server import ServerProcess

HERE = Path(__file__).parent
CONFIG = """
[plugins.llm.scripts.weather]
turns = [{tool_calls = [{name = "weather", arguments = {city = "Bern"}}]}, {text = "It rains."}]

[plugins.llm.scripts.city]
turns = [{tool_calls = [{name = "City", arguments = {name = "Bern"}}]}]
"""


@pytest.fixture(scope="module")
def corral(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of clients: `CORRAL_URL` is the base URL of the gateway, and `CORRAL_KEY` an API key."""
    folder = tmp_path_factory.mktemp("corral")
    file = folder / "corral.toml"
    file.write_text(CONFIG)
    file.chmod(0o600)
    with ServerProcess(folder, arguments=(), environ={"CORRAL_CONFIG": str(file)}) as server, server.sign_in() as admin:
        key = admin.post("/security/api-keys", json={"name": "clients", "scopes": ["*"]})
        assert key.status_code == 201, key.text
        yield {
            **{name: text for name, text in os.environ.items() if name != "UV_CONSTRAINT"},  # the scripts name versions
            "CORRAL_ADDRESS": server.address,
            "CORRAL_URL": f"{server.address}/api/v1/llm",
            "CORRAL_KEY": key.json()["key"],
            "NO_COLOR": "1",
        }


@pytest.fixture
def run(corral: dict[str, str]) -> Callable[..., str]:
    """`run("script.py")`: run a command, which must succeed, and return its last line."""

    def start(*command: str | Path, folder: Path = HERE) -> str:
        done = subprocess.run(command, env=corral, cwd=folder, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        last = (done.stdout.strip().splitlines() or [""])[-1]
        print(last)
        return last

    return start


@pytest.fixture(scope="session")
def node_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the packages of `node/package.json`. Without Node the test is skipped, but not in CI."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        assert "CI" not in os.environ, "Node is missing"
        pytest.skip("needs Node and npm")
    folder = tmp_path_factory.mktemp("node")
    for name in ("package.json", "package-lock.json"):
        shutil.copy(HERE / "node" / name, folder)
    command = ("npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder
