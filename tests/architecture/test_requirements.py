"""Every distribution that an installation brings is imported somewhere, and has a version that CI tests with."""

from __future__ import annotations

import ast
import re
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parents[2]
NOT_IMPORTED = {
    "common-expression-language": "the expressions plugin loads its extension by path, without its terminal",
    "rfc3339-validator": "jsonschema checks `date-time` only if it is installed",
}


def _canonical(requirement: str) -> str:
    return re.split(r"[\[<>=~!; ]", requirement)[0].lower().replace("_", "-")


def _required() -> set[str]:
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    lists = (node.value for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg == "install_requires")
    return {_canonical(each) for each in ast.literal_eval(next(lists))}


def _imported() -> set[str]:
    sources = [path for top in ("kernel", "plugins", "marketplace") for path in (ROOT / top).rglob("*.py")]
    text = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    modules = {
        name
        for pair in re.findall(r"^\s*(?:from|import) (\w+)|import_module\(\"(\w+)", text, re.MULTILINE)
        for name in pair
    }
    owners = packages_distributions()
    return {_canonical(owner) for module in modules for owner in owners.get(module, ())}


def test_every_requirement_is_imported() -> None:
    assert _required() - _imported() == NOT_IMPORTED.keys()


def test_every_requirement_has_a_tested_version() -> None:
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert _required() - {_canonical(line) for line in constraints} == set()
