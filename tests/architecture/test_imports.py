"""The import rules, except for the rings of the kernel, which are a contract of import-linter in pyproject.toml.

The rules of plugins are those that `corral check` applies (`corral.testing.source_rules`).

There is no list of exceptions: a line that breaks a rule moves, or the rule changes for everyone.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

from corral.testing.source_rules import (
    CORE_PACKAGE,
    Package,
    foreign_plugin_imports,
    is_private_kernel_module,
    private_kernel_imports,
)
from corral.testing.source_rules import is_under as _under

ROOT = Path(__file__).parents[2]

# Inside a plugin. A module with another name (a provider, a parser) is a part of the service.
RANKS = {"api": 0, "hookspecs": 1, "models": 2, "service": 3, "routes": 4, "jobs": 4, "plugin": 5}
POSTPONED = "from __future__ import annotations"
RELATIVE = re.compile(r"\bfrom[\s\\]*\.")  # only these texts are parsed, because parsing every module takes seconds
VAGUE = frozenset({"utils", "util", "helpers", "helper", "common", "manager", "managers"})


@dataclass(frozen=True)
class Import:
    """`names` in full: `from a import b` gives a.b, whether b is a module or a name in a."""

    line: int
    names: tuple[str, ...]


def _imports(tree: ast.Module) -> Iterator[Import]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield Import(node.lineno, tuple(alias.name for alias in node.names))
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield Import(node.lineno, tuple(f"{node.module}.{alias.name}" for alias in node.names))


@dataclass(frozen=True)
class Module:
    """Its tree is parsed anew each time: kept through a whole run, a million nodes are gone through by every collection
    of garbage.
    """

    path: Path
    name: str

    @cached_property
    def imports(self) -> tuple[Import, ...]:
        """Every one, also inside functions and under TYPE_CHECKING. Read when a test asks: all processes collect."""
        return tuple(_imports(self.tree))

    @property
    def text(self) -> str:
        return (ROOT / self.path).read_text(encoding="utf-8")

    @property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    def imported(self) -> Iterator[tuple[str, str]]:
        """(imported name, place) of each name that is imported."""
        for statement in self.imports:
            for name in statement.names:
                yield name, f"{self.path}:{statement.line}"


@dataclass(frozen=True)
class PluginPackage:
    """A plugin: `package` is its import name (corral_plugins.tasks), `name` what other plugins call it."""

    name: str
    package: str
    folder: Path
    modules: tuple[Module, ...]

    def read(self) -> Package:
        return Package.read(self.package, self.folder)

    def manifest(self, attribute: str) -> tuple[str, ...]:
        """`requires` or `wants` as written in the class of plugin.py."""
        for module in self.modules:
            if module.name == f"{self.package}.plugin":
                for node in ast.walk(module.tree):
                    if isinstance(node, ast.ClassDef) and node.name.endswith("Plugin"):
                        return _class_tuple(node, attribute)
        return ()


def _class_tuple(node: ast.ClassDef, attribute: str) -> tuple[str, ...]:
    for statement in node.body:
        targets: list[ast.expr] = []
        if isinstance(statement, ast.Assign):
            targets = statement.targets
        elif isinstance(statement, ast.AnnAssign):
            targets = [statement.target]
        else:
            continue
        if statement.value and any(isinstance(target, ast.Name) and target.id == attribute for target in targets):
            return tuple(ast.literal_eval(statement.value))
    return ()


def _modules(source_root: Path, package: str) -> tuple[Module, ...]:
    found = []
    for path in sorted((source_root / package).rglob("*.py")):
        parts = path.relative_to(source_root).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found.append(Module(path.relative_to(ROOT), name))
    return tuple(found)


KERNEL = _modules(ROOT / "kernel", "corral")
CORE = _modules(ROOT / "kernel", "corral_core")
BUILT_IN = _modules(ROOT / "plugins", "corral_plugins")
MARKETPLACE = _modules(ROOT / "marketplace", "corral_marketplace")


def _plugins() -> tuple[PluginPackage, ...]:
    found = []
    for root, modules in ((ROOT / "kernel" / "corral_core", CORE), (ROOT / "plugins" / "corral_plugins", BUILT_IN)):
        for folder in sorted(root.glob("*/__init__.py")):
            name = folder.parent.name
            package = f"{root.name}.{name}"
            own = tuple(module for module in modules if f"{module.name}.".startswith(f"{package}."))
            found.append(PluginPackage(name, package, folder.parent, own))
    for folder in sorted((ROOT / "contrib").glob("*/corral_*/__init__.py")):
        package = folder.parent.name
        modules = _modules(folder.parents[1], package)
        found.append(PluginPackage(package.removeprefix("corral_"), package, folder.parent, modules))
    return tuple(found)


PLUGINS = _plugins()
EVERY_MODULE = (
    *KERNEL,
    *CORE,
    *BUILT_IN,
    *MARKETPLACE,
    *(m for p in PLUGINS if "." not in p.package for m in p.modules),
)

plugins = pytest.mark.parametrize("plugin", PLUGINS, ids=[plugin.name for plugin in PLUGINS])


def _part(name: str, package: str) -> str:
    """`service` of corral_plugins.tasks.service.claims; empty for the package itself."""
    return name.removeprefix(package).removeprefix(".").split(".")[0]


def test_the_kernel_imports_no_plugin() -> None:
    """Only the test kit imports plugins: it signs users in, so it imports the kernel's own plugins."""
    assert [
        f"{place} imports {name}"
        for module in KERNEL
        for name, place in module.imported()
        if name.startswith("corral_") and not (_under(module.name, "corral.testing") and _under(name, CORE_PACKAGE))
    ] == []


def test_the_marketplace_imports_no_plugin_and_of_the_kernel_what_is_public() -> None:
    assert [
        f"{place} imports {name}"
        for module in MARKETPLACE
        for name, place in module.imported()
        if is_private_kernel_module(name) or (name.startswith("corral_") and not _under(name, "corral_marketplace"))
    ] == []


@plugins
def test_a_plugin_imports_only_the_public_kernel(plugin: PluginPackage) -> None:
    if not _under(plugin.package, CORE_PACKAGE):
        assert list(private_kernel_imports(plugin.read())) == []


@plugins
def test_a_plugin_imports_of_another_only_the_api_and_only_if_it_names_it(plugin: PluginPackage) -> None:
    named = {*plugin.manifest("requires"), *plugin.manifest("wants")}
    packages = {other.package: other.name for other in PLUGINS}
    assert list(foreign_plugin_imports(plugin.read(), named, packages)) == []


@plugins
def test_an_api_imports_no_other_plugin(plugin: PluginPackage) -> None:
    assert [
        f"{place} imports {name}"
        for module in plugin.modules
        if _under(module.name, f"{plugin.package}.api")
        for name, place in module.imported()
        for other in PLUGINS
        if other.package != plugin.package and _under(name, other.package)
    ] == []


@plugins
def test_inside_a_plugin_imports_go_down(plugin: PluginPackage) -> None:
    wrong = []
    for module in plugin.modules:
        own = _part(module.name, plugin.package)
        for name, place in module.imported():
            if not _under(name, plugin.package):
                continue
            part = _part(name, plugin.package)
            down = RANKS.get(part, 3) < RANKS.get(own, 3)
            beside = part == own or (RANKS.get(part, 3) == RANKS.get(own, 3) == 3)
            if own in ("", "migrations") or not (down or beside):
                wrong.append(f"{place}: {own or 'the package'} imports {name}")
    assert wrong == []


def test_imports_are_absolute() -> None:
    assert [
        f"{module.path}:{node.lineno}"
        for module in EVERY_MODULE
        if RELATIVE.search(module.text)
        for node in ast.walk(module.tree)
        if isinstance(node, ast.ImportFrom) and node.level > 0
    ] == []


def test_annotations_are_postponed_everywhere() -> None:
    def postponed(tree: ast.Module) -> bool:
        return any(isinstance(n, ast.ImportFrom) and n.module == "__future__" for n in tree.body)

    def empty(tree: ast.Module) -> bool:
        return all(isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant) for n in tree.body)

    unclear = [m for m in EVERY_MODULE if POSTPONED not in m.text.splitlines()]
    assert [str(m.path) for m in unclear if not empty(m.tree) and not postponed(m.tree)] == []


def test_no_module_has_a_name_that_says_nothing() -> None:
    assert [str(module.path) for module in EVERY_MODULE if VAGUE & {*module.name.split(".")}] == []


def test_packages_of_a_plugin_cost_nothing_to_import() -> None:
    """`__init__.py` is a docstring: names are imported from the module that defines them."""
    assert [
        str(module.path)
        for plugin in PLUGINS
        for module in plugin.modules
        if module.name == plugin.package and len(module.tree.body) > 1
    ] == []
