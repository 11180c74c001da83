"""Every plugin's folder has its entry point, and every entry point its folder."""

from __future__ import annotations

import ast
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
BUILT_IN = ("corral_core.", "corral_plugins.")


def _entry_points() -> dict[str, list[str]]:
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "setup":
            found: dict[str, Any] = {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg}
            groups: dict[str, list[str]] = ast.literal_eval(found["entry_points"])
            return groups
    raise AssertionError("setup.py calls no setup()")


def _expected() -> list[str]:
    lines = []
    for package in (ROOT / "kernel" / "corral_core", ROOT / "plugins" / "corral_plugins"):
        for path in package.glob("*/__init__.py"):
            name = path.parent.name
            camel = "".join(word.capitalize() for word in name.split("_"))
            lines.append(f"{name} = {package.name}.{name}.plugin:{camel}Plugin")
    return sorted(lines)


def test_plugins_are_the_folders_alphabetically() -> None:
    assert _entry_points()["corral.plugins"] == _expected()


def test_commands_are_those_of_the_hook() -> None:
    """A command is found by its entry point, without its plugin. The hook stays what plugins are asked by."""
    points = [point for point in metadata.entry_points(group="corral.plugins") if point.module.startswith(BUILT_IN)]
    loaded = [point.load()() for point in points]
    contributed = [command for plugin in loaded for command in getattr(plugin, "corral_commands", tuple)()]
    indexed = {point.name: point.load() for point in metadata.entry_points(group="corral.commands")}
    assert {command.name: command for command in contributed} == indexed
    assert _entry_points()["corral.commands"] == sorted(_entry_points()["corral.commands"])


def test_pytest_plugin_is_named_as_its_module() -> None:
    """Else pytest, told of the module by `-p` or `pytest_plugins`, registers it a second time."""
    assert _entry_points()["pytest11"] == ["corral.testing.plugin = corral.testing.plugin"]
