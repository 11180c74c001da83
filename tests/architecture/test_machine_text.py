"""What machines report loses its credentials before anything is done with it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]

# Bodies that the handler needs as they came; it redacts what it stores and what it sends on.
REDACT_THEMSELVES = {
    ("tools", "/{id}/tools/{tool}"): "the arguments are what the tool is called with",
    ("tools", "/{id}/tools/calls/{call}/result"): "the permit is a signed text",
}


def _lenient() -> Iterator[tuple[str, str, bool]]:
    """Yield (plugin, path, redacted) of each route that cleans the text of machines instead of refusing it."""
    for file in sorted((ROOT / "plugins" / "corral_plugins").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
                options = {each.arg for each in node.keywords if ast.unparse(each.value) == "True"}
                if "lenient" in options:
                    plugin = file.relative_to(ROOT / "plugins" / "corral_plugins").parts[0]
                    yield plugin, str(node.args[0].value), "redacted" in options


def test_routes_for_reports_of_machines_are_redacted() -> None:
    found = list(_lenient())
    assert len(found) >= 8
    assert {(plugin, path) for plugin, path, redacted in found if not redacted} == {*REDACT_THEMSELVES}
