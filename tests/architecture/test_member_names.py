"""Each `Class.member` that the documentation names in backticks exists, if Corral has a public class of this name."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = ("kernel/corral", "kernel/corral_core", "plugins/corral_plugins")
PAGES = (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"))
NAMED = re.compile(r"`([A-Z][A-Za-z0-9]+)\.([a-z_][a-z0-9_]*)\b[^`]*`")


def members() -> dict[str, set[str]]:
    """The attributes and methods of all public classes, by the name of the class. Those of base classes count too."""
    own: dict[str, set[str]] = defaultdict(set)
    bases: dict[str, set[str]] = defaultdict(set)
    for folder in SOURCES:
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.ClassDef):
                    own[node.name] |= {name for inner in ast.walk(node) for name in defined(inner)}
                    bases[node.name] |= {ast.unparse(base).split("[")[0].split(".")[-1] for base in node.bases}

    def inherited(name: str, seen: frozenset[str] = frozenset()) -> set[str]:
        above = (inherited(base, seen | {name}) for base in bases[name] - seen if base in own)
        return own[name].union(*above)

    return {name: inherited(name) for name in list(own)}


def defined(node: ast.AST) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return [node.name]
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):  # self.name = …
        return [node.attr]
    return [node.id] if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) else []


def test_named_members_of_classes_exist() -> None:
    known = members()
    wrong = [
        f"{page.relative_to(ROOT)}: {kind}.{member}"
        for page in PAGES
        for kind, member in NAMED.findall(page.read_text("utf-8"))
        if kind in known and member not in known[kind]
    ]
    assert not wrong, wrong
