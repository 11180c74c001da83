"""No plugin knows which database engine serves it: what engines say differently is a helper of `corral.database`."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
ENGINE = re.compile("sqlite|postgres|psycopg", re.IGNORECASE)
FOLDERS = ("plugins/corral_plugins", "kernel/corral_core", "contrib")
FILES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py")) if "tests" not in path.parts]


def _sources() -> Iterator[tuple[Path, ast.Module]]:
    """Yield the modules whose text names an engine somewhere. Parsing the others would take seconds."""
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        if ENGINE.search(text):
            yield path, ast.parse(text)


def _words(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Every name and text in the code with its line; comments and docstrings may name an engine."""
    told = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, (str, bytes)) and id(node) not in told:
            yield node.lineno, str(node.value)
        elif isinstance(node, ast.Name):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute):
            yield node.lineno, node.attr
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.alias)):
            yield node.lineno, node.name


def test_no_plugin_names_an_engine() -> None:
    assert [
        f"{path.relative_to(ROOT)}:{line}"
        for path, tree in _sources()
        for line, word in _words(tree)
        if ENGINE.search(word)
    ] == []
