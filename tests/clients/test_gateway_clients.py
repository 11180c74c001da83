"""Stock clients of OpenAI's API against the gateway: a completion, a stream, a tool call, the models and an error each.

The clients that the test environment has anyway are run with it. `tox run -e clients` runs all, each in an environment
of its own with the version that its script names.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.one_engine

HERE = Path(__file__).parent
INSTALLED = ("openai", "pydantic_ai")
IN_NODE = ("with_openai.mjs", "with_ai_sdk.mjs")


@pytest.mark.parametrize("name", INSTALLED)
def test_llm_1_installed_clients(run: Callable[..., str], name: str) -> None:
    assert run(sys.executable, HERE / "scripts" / f"with_{name}.py")


@pytest.fixture(scope="session")  # before Node's packages are fetched
def all_clients(request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("--long"):
        pytest.skip("tox run -e clients")


@pytest.mark.slow
@pytest.mark.usefixtures("all_clients")
@pytest.mark.parametrize("script", sorted(each.name for each in HERE.glob("scripts/with_*.py")))
def test_llm_1_clients_in_python(run: Callable[..., str], script: str) -> None:
    command = (sys.executable, "-m", "uv", "run", "--quiet", "--no-config", "--python", sys.executable, "--script")
    assert run(*command, HERE / "scripts" / script)


@pytest.mark.slow
@pytest.mark.usefixtures("all_clients")
@pytest.mark.parametrize("script", IN_NODE)
def test_llm_1_clients_in_node(run: Callable[..., str], node_folder: Path, script: str) -> None:
    shutil.copy(HERE / "node" / script, node_folder)
    assert run("node", script, folder=node_folder)
