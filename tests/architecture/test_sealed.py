"""What is sealed lies in columns that say so: a change of master keys finds every one of them."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
HOMES = (ROOT / "kernel" / "corral", *sorted((ROOT / "plugins" / "corral_plugins").glob("[a-z]*/")))


def _seals(tree: ast.AST) -> bool:
    """Whether something is called that is named `encrypt`, with a place."""
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    return any(
        isinstance(call.func, ast.Attribute)
        and call.func.attr == "encrypt"
        and any(each.arg == "aad" for each in call.keywords)
        for call in calls
    )


def _names(tree: ast.AST) -> set[str]:
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def test_plugins_that_encrypt_values_declare_sealed_columns() -> None:
    sealing, declaring = set(), set()
    for home in HOMES:
        texts = [path.read_text("utf-8") for path in home.rglob("*.py") if "migrations" not in path.parts]
        trees = [ast.parse(text) for text in texts if "encrypt" in text or "SealedField" in text]
        if any(map(_seals, trees)):
            sealing.add(home.name)
        if any("SealedField" in _names(tree) for tree in trees):
            declaring.add(home.name)
    assert {"corral", "secrets"} <= sealing
    assert sealing <= declaring


def test_sealed_texts_are_in_no_plain_column() -> None:
    """A column whose name says that it is sealed is one."""
    plain = []
    for home in HOMES:
        for path in home.rglob("*.py"):
            if "migrations" in path.parts:
                continue
            text = path.read_text("utf-8")
            if "TextField" not in text:
                continue
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
                    names = [each.id for each in node.targets if isinstance(each, ast.Name)]
                    made = ast.unparse(node.value.func)
                    if any("sealed" in name or name == "seed" for name in names) and made.endswith("TextField"):
                        plain.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert plain == []
