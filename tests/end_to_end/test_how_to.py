"""The how-to guides: their shell blocks run as they stand, in order, in the folder of one installation."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
GUIDES = sorted((DOCS / "how-to").glob("*.md"))


def script_of(page: Path) -> str:
    """The shell blocks of a page, those in lists too."""
    return "\n".join(re.findall(r"^ *```sh\n(.*?)^ *```", page.read_text("utf-8"), re.DOTALL | re.MULTILINE))


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an installation that has a master key."""
    folder = tmp_path_factory.mktemp("how-to")
    (folder / "bin").mkdir()
    (folder / "bin" / "corral").symlink_to(Path(sys.executable).with_name("corral"))
    done = run("corral migrate && corral user list", folder)
    assert done.returncode == 0, done
    return folder


def run(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("CORRAL_")}
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder,
        env={**environ, "PATH": f"{folder / 'bin'}:{environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )


@pytest.mark.parametrize("page", GUIDES, ids=[page.stem for page in GUIDES])
def test_the_commands_of_a_guide_run(page: Path, installation: Path) -> None:
    done = run(script_of(page), installation)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("page", [DOCS / "README.md", *GUIDES], ids=lambda page: page.stem)
def test_the_links_of_a_guide_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text("utf-8"))
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


def test_the_index_names_every_guide() -> None:
    index = (DOCS / "README.md").read_text("utf-8")
    assert [page.name for page in GUIDES if f"(how-to/{page.name})" not in index] == []
