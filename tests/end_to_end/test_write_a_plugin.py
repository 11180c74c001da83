"""The guide for authors of plugins: its blocks are one plugin, whose tests and command run as they stand."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from corral.testing.plugin_folder import PluginFolder

pytestmark = pytest.mark.one_engine

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "write-a-plugin.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that the page shows. A block continues the file that its first line names."""
    files: dict[str, str] = defaultdict(str)
    for name, text in re.findall(r"^```python\n# (\S+)\n(.*?)^```", PAGE.read_text("utf-8"), re.DOTALL | re.MULTILINE):
        files[name] += text
    blocks = PAGE.read_text("utf-8").count("\n```python\n")
    assert blocks == len(re.findall(r"^```python\n# \S+\.py$", PAGE.read_text("utf-8"), re.MULTILINE)) > 8
    folder = tmp_path_factory.mktemp("shelf")
    (folder / "test_shelf.py").write_text(files.pop("test_shelf.py"), "utf-8")
    PluginFolder(folder / "plugins").add("shelf", files.pop("plugin.py"), files)
    return folder


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("CORRAL_", "PYTEST_"))}
    environ |= {"PYTHONPATH": str(folder / "plugins"), "CORRAL_CONFIG": str(folder / "corral.toml")}
    return subprocess.run(
        [sys.executable, "-m", *command],
        cwd=folder,
        env=environ,
        capture_output=True,
        text=True,
        timeout=600,  # seconds; a busy machine takes several minutes
        check=False,
    )


def test_the_tests_of_the_guide_pass(folder: Path, request: pytest.FixtureRequest) -> None:
    engines = [] if request.config.getoption("--long") else ["-m", "not postgres"]
    options = ["-q", "-p", "no:cacheprovider", "-o", "asyncio_mode=auto", *engines]
    done = run(folder, "pytest", *options, "test_shelf.py")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_the_command_of_the_guide_runs(folder: Path) -> None:
    (folder / "corral.toml").write_text(f'data_dir = "{folder}/data"\n[plugins]\nenabled = ["shelf"]\n', "utf-8")
    assert run(folder, "corral", "migrate").returncode == 0
    done = run(folder, "corral", "shelf", "list", "--json")
    assert (done.returncode, json.loads(done.stdout)) == (0, {"items": []}), done.stderr
    assert "List the newest books" in run(folder, "corral", "shelf", "--help").stdout
