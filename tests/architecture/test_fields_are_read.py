"""Whatever a request, a setting or the configuration may say is read by some code: nothing is accepted and ignored."""

from __future__ import annotations

import ast
import asyncio
import functools
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest

from corral.config.model import Config
from corral.plugin import Setting
from corral.plugins.record import PluginRecord
from corral.testing.kit import make_kernel

ROOT = Path(__file__).parents[2]
SOURCES = {"corral": ROOT / "kernel", "corral_core": ROOT / "kernel", "corral_plugins": ROOT / "plugins"}

ANYTHING = re.compile("")
# These are handed on as they came: to the model provider, or to whoever reads the result of a task.
HANDED_ON = {"FunctionTool.strict", "StreamOptions.include_obfuscation", "Artifact.content"}


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[PluginRecord]:
    async def boot() -> list[PluginRecord]:
        async with make_kernel(tmp_path_factory.mktemp("kernel")) as kit:
            return list(kit.kernel.plugins)

    return asyncio.run(boot())


def shapes_in(kind: Any, found: dict[type[msgspec.Struct], None] | None = None) -> dict[type[msgspec.Struct], None]:
    """Return the structs that a type consists of, at any depth."""
    found = {} if found is None else found
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct) and kind not in found:
        found[kind] = None
        for field in msgspec.structs.fields(kind):
            shapes_in(field.type, found)
    for part in get_args(kind):
        shapes_in(part, found)
    return found


def area_of(module: str) -> str:
    """Return the package that a module belongs to: that of a plugin, or the kernel."""
    return ".".join(module.split(".")[: 1 if module.startswith("corral.") else 2])


def trees(area: str, named: re.Pattern[str] = ANYTHING) -> Iterator[ast.Module]:
    """Yield the modules of a package in whose text the pattern is found."""
    top = area.partition(".")[0]
    for path in (SOURCES[top] / area.replace(".", "/")).rglob("*.py"):
        if "migrations" not in path.parts:
            text = path.read_text("utf-8")
            if named.search(text):
                yield ast.parse(text)


class _Reads(ast.NodeVisitor):
    """Collects attributes that are read, strings that may be keys, and the packages that are imported."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.areas: set[str] = set()

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if isinstance(node.ctx, ast.Load):
            self.names.add(node.attr)
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str):
            self.names.add(node.value.rpartition(".")[2])  # `security.access_ttl_seconds` names the field as well

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)  # an annotation reads nothing

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.module is not None and node.module.partition(".")[0] in SOURCES:
            self.areas.add(area_of(node.module))


@functools.cache
def reads_of(area: str) -> _Reads:
    found = _Reads()
    for tree in trees(area):
        found.visit(tree)
    return found


def names_read(*areas: str) -> set[str]:
    """Return the names that the packages read, or the plugins whose services they use."""
    every = {*areas, *(other for area in areas for other in reads_of(area).areas if other != "corral")}
    return {name for area in every for name in reads_of(area).names}


def unread_fields(shape: type[msgspec.Struct], *areas: str) -> set[str]:
    declared = [area_of(each.__module__) for each in shape.__mro__ if each.__module__.partition(".")[0] in SOURCES]
    read = names_read(*declared, *areas)
    names = {f"{shape.__name__}.{field.name}": field for field in msgspec.structs.fields(shape)}
    return {
        name for name, field in names.items() if not {field.name, field.encode_name} & read and name not in HANDED_ON
    }


def test_every_field_of_every_request_is_read(records: list[PluginRecord]) -> None:
    routes = [route for loaded in records for group in loaded.contributions_to("corral_routes") for route in group]
    assert len(routes) > 100
    unread = set()
    for route in routes:
        assert route.signature is not None
        for shape in [*shapes_in(route.signature.body), *shapes_in(route.signature.query)]:
            unread |= unread_fields(shape, area_of(route.handler.__module__))
    assert unread == set()


def test_every_setting_is_read(records: list[PluginRecord]) -> None:
    declared = {each.name for loaded in records for each in loaded.contributions_to("corral_settings")}
    ours = [module for name, module in sys.modules.items() if name.partition(".")[0] in SOURCES]
    constants: dict[str, set[str]] = defaultdict(set)  # a plugin may have its own constant for another's setting
    for name, value in [item for module in ours for item in vars(module).items()]:
        if isinstance(value, Setting):
            constants[value.name].add(name)
    assert len(declared) > 60
    assert declared <= constants.keys()
    named = re.compile("|".join(rf"\b{name}\b" for setting in sorted(declared) for name in sorted(constants[setting])))
    read = {name for area in SOURCES for tree in trees(area, named) for name in _constants_read(tree)}
    assert {setting for setting in declared if not constants[setting] & read} == set()


def _constants_read(node: ast.AST) -> Iterator[str]:
    """Yield the constants that code names. The declarations of settings, and lists of them, do not count."""
    if isinstance(node, ast.FunctionDef) and node.name == "corral_settings":
        return
    if isinstance(node, ast.Tuple) and all(isinstance(each, ast.Name | ast.Starred) for each in node.elts):
        return
    if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Load):
        yield node.id if isinstance(node, ast.Name) else node.attr
    for child in ast.iter_child_nodes(node):
        yield from _constants_read(child)


def test_every_key_of_the_configuration_is_read(records: list[PluginRecord]) -> None:
    unread = {name for shape in shapes_in(Config) for name in unread_fields(shape, "corral")}
    for loaded in records:
        for shape in (
            shapes_in(loaded.kind.config) if loaded.kind is not None and loaded.kind.config is not None else ()
        ):
            unread |= unread_fields(shape)
    assert unread == set()
