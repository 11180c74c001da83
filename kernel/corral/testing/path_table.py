"""Generates the table of the paths that the built-in plugins serve.

The server uses the table to return a 503 response for the paths of plugins that are not running.

Run `python -m corral.testing.path_table --write` to update the table after adding or removing a route.
"""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

from corral.testing.generator_command import main, temporary_application

PACKAGE = "corral_plugins"


def render_path_table() -> str:
    """Return the path table as JSON, generated from a kernel with all built-in plugins."""
    with temporary_application() as application:
        found: dict[str, list[str]] = {}
        for endpoint in application.endpoints:
            found.setdefault(endpoint.route.plugin, []).append(endpoint.label)
        for loaded in application.kernel.active:
            for item in loaded.contributions_to("corral_sockets"):
                found.setdefault(loaded.name, []).append(f"WS {item.path}")
    return json.dumps({name: sorted(found[name], key=_path_and_method) for name in sorted(found)}, indent=2) + "\n"


def generated_files() -> dict[Path, str]:
    """Return the generated file with the path table, as `{path of the file: text}`."""
    return {Path(str(resources.files(PACKAGE).joinpath("paths.json"))): render_path_table()}


def _path_and_method(label: str) -> tuple[str, str]:
    method, _, path = label.partition(" ")
    return path, method


if __name__ == "__main__":
    main(generated_files)
