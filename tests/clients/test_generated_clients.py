"""Clients that are generated from the OpenAPI document, checked for their types, and used for the README's main job.

The short form generates only the operations of that job. The long form, `tox run -e clients`, generates them all.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx2
import pytest

pytestmark = [
    pytest.mark.one_engine,
    pytest.mark.skipif(find_spec("uv") is None, reason="tox run -e types, clients"),
]

HERE = Path(__file__).parent
OPERATIONS = {
    "/api/v1/agents": ("post",),
    "/api/v1/agents/{id}": ("get",),
    "/api/v1/agents/{id}/start": ("post",),
    "/api/v1/tasks": ("post",),
    "/api/v1/tasks/{id}": ("get",),
}
GENERATOR = ("openapi-python-client==0.29.1", "mypy>=2.4,<3")
WITHOUT_FORMATTING = "post_hooks: []\n"


@pytest.fixture(scope="module")
def document(request: pytest.FixtureRequest, corral: dict[str, str]) -> dict[str, Any]:
    address = f"{corral['CORRAL_ADDRESS']}/api/v1/openapi.json"
    whole = httpx2.get(address, trust_env=False, timeout=60).raise_for_status().json()
    return whole if request.config.getoption("--long") else reduced(whole)


def reduced(document: dict[str, Any]) -> dict[str, Any]:
    """The document with the operations of the job, and the components that they refer to."""
    paths = {path: {name: document["paths"][path][name] for name in names} for path, names in OPERATIONS.items()}
    components: dict[str, Any] = {"securitySchemes": document["components"]["securitySchemes"]}
    unread: Any = paths
    while references := set(re.findall(r'"#/components/(\w+)/([^"]+)"', json.dumps(unread))):
        unread = [
            components.setdefault(kind, {}).setdefault(name, document["components"][kind][name])
            for kind, name in references
            if name not in components.get(kind, {})
        ]
    return {**document, "paths": paths, "components": components}


def test_conventions_a_client_in_python(run: Callable[..., str], document: dict[str, Any], tmp_path: Path) -> None:
    def python(*arguments: str) -> str:
        """Run a module in an environment of its own: the generator needs packages that change what the SDKs use."""
        uv = (sys.executable, "-m", "uv", "run", "--quiet", "--no-project", "--no-config", "--python", sys.executable)
        packages = [f"--with={package}" for package in GENERATOR]
        return run(*uv, *packages, "python", *arguments, folder=tmp_path)

    (tmp_path / "openapi.json").write_text(json.dumps(document))
    (tmp_path / "config.yaml").write_text(WITHOUT_FORMATTING)
    shutil.copy(HERE / "generated" / "job.py", tmp_path)
    output = ("--meta", "none", "--config", "config.yaml", "--output-path", "corral_api", "--fail-on-warning")
    python("-m", "openapi_python_client", "generate", "--path", "openapi.json", *output)
    strict = ("--strict", "--no-warn-redundant-casts", "--config-file=")  # the generator writes redundant casts
    python("-m", "mypy", *strict, "job.py", "corral_api")
    assert python("job.py") == "done"


def test_conventions_a_client_in_typescript(
    run: Callable[..., str], node_folder: Path, document: dict[str, Any]
) -> None:
    (node_folder / "openapi.json").write_text(json.dumps(document))
    for name in ("job.ts", "tsconfig.json"):
        shutil.copy(HERE / "node" / name, node_folder)
    options = ("--output", "corral.d.ts", "--default-non-nullable", "false")  # a field with a default may be left out
    run("npx", "--no-install", "openapi-typescript", "openapi.json", *options, folder=node_folder)
    run("npx", "--no-install", "tsc", "--project", "tsconfig.json", folder=node_folder)
    assert run("node", "job.js", folder=node_folder) == "done"
