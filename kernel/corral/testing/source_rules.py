"""Rules about the source files and hooks of a plugin, checked without running the plugin."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from corral import hookspecs
from corral.plugin import Plugin
from corral.testing.findings import Finding, rule_findings

# The modules of the kernel that plugins may import, except `PRIVATE` parts of them.
PUBLIC = frozenset(
    {
        "auth",
        "cli.api_client",
        "cli.file_stores",
        "cli.logging_setup",
        "cli.object_lookup",
        "cli.output",
        "cli.request_body",
        "cli.server_connection",
        "cli.status_parts",
        "clock",
        "crypto",
        "database",
        "egress",
        "errors",
        "events",
        "hookspecs",
        "http",
        "ids",
        "jobs",
        "metrics",
        "plugin",
        "redact",
        "schema",
        "settings",
        "storage",
        "testing",
    }
)
PRIVATE = ("corral.metrics.requests", "corral.settings.kernel")
BUILT_IN = "corral_plugins"
NETWORK = ("aiohttp", "ftplib", "http.client", "httpx", "requests", "smtplib", "socket", "urllib.request", "urllib3")
CORE_PACKAGE = "corral_core"  # core plugins may import private modules of the kernel


class Source(msgspec.Struct, frozen=True):
    """One source file: its module name, its path, and the imports and classes in it."""

    module: str
    path: Path
    nodes: list[ast.Import | ast.ImportFrom | ast.ClassDef]

    @classmethod
    def read(cls, module: str, path: Path) -> Source:
        """Read the source file of a module."""
        found = ast.walk(ast.parse(path.read_text("utf-8")))
        return cls(
            module, path, [node for node in found if isinstance(node, ast.Import | ast.ImportFrom | ast.ClassDef)]
        )

    def imports(self) -> Iterator[tuple[str, int]]:
        """Yield (name, line) for every absolute import, including imports in functions.

        For `from a import b`, the name is `a.b`.
        """
        for node in self.nodes:
            if isinstance(node, ast.Import):
                yield from ((alias.name, node.lineno) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


class Package(msgspec.Struct, frozen=True):
    """The source files of a plugin: the package that contains its class, or a single module."""

    name: str
    sources: list[Source]

    @classmethod
    def of(cls, kind: type[Plugin]) -> Package:
        """Return the package in which the plugin class is defined."""
        name, path = _package_location(kind)
        if path.is_dir():
            return cls.read(name, path)
        return cls(name, [Source.read(name, path)])

    @classmethod
    def read(cls, name: str, folder: Path) -> Package:
        """Read the package `name` from the source files in a folder."""
        return cls(name, [_read_source(name, folder, path) for path in sorted(folder.rglob("*.py"))])

    def subclasses(self, base: str) -> list[tuple[str, ast.ClassDef]]:
        """Return (module, class) for every direct or indirect subclass of `base` in the package.

        `base` is a full name, such as `corral.events.event.Event`.
        """
        bases = {base}
        found: dict[str, tuple[str, ast.ClassDef]] = {}
        while True:
            new = {}
            for source in self.sources:
                for node, names in _classes(source):
                    full = f"{source.module}.{node.name}"
                    if full not in found and bases & set(names):
                        new[full] = (source.module, node)
            if not new:
                return list(found.values())
            found |= new
            bases |= set(new)


def source_rules(
    kind: type[Plugin], package: Package, neighbours: Sequence[type[Plugin]], installed: Mapping[str, type[Plugin]]
) -> Iterator[Finding]:
    """Check the hooks and imports of a plugin.

    `neighbours` contains the installed plugins that the plugin lists in `requires` or `wants`.
    """
    yield from rule_findings("hooks.names", _check_hooks(kind, neighbours))
    if package.name.partition(".")[0] != CORE_PACKAGE:
        packages = {_package_location(other)[0]: name for name, other in installed.items()}
        yield from rule_findings("imports.kernel", private_kernel_imports(package))
        if package.name.partition(".")[0] != BUILT_IN:
            yield from rule_findings("imports.network", network_imports(package))
        yield from rule_findings(
            "imports.plugins", foreign_plugin_imports(package, (*kind.requires, *kind.wants), packages)
        )


def _package_location(kind: type[Plugin]) -> tuple[str, Path]:
    """Return the name and folder of the plugin's package, or the name and path of its single module."""
    module = inspect.getmodule(kind)
    path = Path(inspect.getfile(kind))
    name = module.__name__ if module is not None else path.stem
    if name.endswith(".plugin") and (path.parent / "__init__.py").exists():
        return name.removesuffix(".plugin"), path.parent
    return name, path


def _read_source(package: str, root: Path, path: Path) -> Source:
    parts = path.relative_to(root).with_suffix("").parts
    module = ".".join((package, *(parts[:-1] if parts[-1] == "__init__" else parts)))
    return Source.read(module, path)


def _classes(source: Source) -> Iterator[tuple[ast.ClassDef, list[str]]]:
    """Yield every class with the full names of its base classes, where the file's imports determine these names."""
    known: dict[str, str] = {}
    for node in source.nodes:
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            known |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            known |= {alias.asname: alias.name for alias in node.names if alias.asname}
    for node in source.nodes:
        if isinstance(node, ast.ClassDef):
            yield node, [_full_name(base, known, source.module) for base in node.bases]


def _full_name(node: ast.expr, known: Mapping[str, str], module: str) -> str:
    text = ast.unparse(node).partition("[")[0]
    first, dot, rest = text.partition(".")
    if not dot:
        return known.get(first, f"{module}.{first}")
    return f"{known.get(first) or first}.{rest}"


def _check_hooks(kind: type[Plugin], neighbours: Sequence[type[Plugin]]) -> Iterator[str]:
    specs = _hook_names(hookspecs)
    for owner in (kind, *neighbours):
        for module in _hookspec_modules(owner):
            specs |= _hook_names(module)
    for name, function in inspect.getmembers(kind, callable):
        if not name.startswith("corral_") or name == "corral_impl":
            continue
        if not hasattr(function, "corral_impl"):
            yield f"{name} is not marked with @hookimpl, so it is never called"
        elif name not in specs:
            yield (
                f"{name}: there is no such hook; check the spelling, and add the plugin that specifies the hook to "
                "requires or wants"
            )


def _hookspec_modules(owner: type[Plugin]) -> Iterable[Any]:
    """Return the modules in which a plugin specifies hooks for other plugins."""
    try:
        plugin = owner.__new__(owner)
        return list(plugin.corral_hookspecs()) if hasattr(plugin, "corral_hookspecs") else []
    except Exception:  # a plugin that needs its configuration here is checked when it runs
        return []


def _hook_names(module: Any) -> set[str]:
    return {name for name in vars(module) if name.startswith("corral_")}


def is_under(name: str, package: str) -> bool:
    """Return whether a dotted name is `package` or a name within `package`."""
    return f"{name}.".startswith(f"{package}.")


def is_private_kernel_module(name: str) -> bool:
    """Return whether a dotted name belongs to a private module of the kernel."""
    if not is_under(name, "corral"):
        return False
    is_public = any(is_under(name, f"corral.{each}") for each in PUBLIC)
    return not is_public or any(is_under(name, each) for each in PRIVATE)


def private_kernel_imports(package: Package) -> Iterator[str]:
    """Yield a message for each import of a private module of the kernel."""
    for source in package.sources:
        for name, line in source.imports():
            if is_private_kernel_module(name):
                yield f"{source.path.name}:{line} imports {name}, which is not a public module of the kernel"


def network_imports(package: Package) -> Iterator[str]:
    """Yield a message for each import of a module that can open network connections without the egress guard.

    Such imports are errors: requests through these modules bypass the guard, and may run inside a unit of work.
    """
    for source in package.sources:
        for name, line in source.imports():
            if any(is_under(name, each) for each in NETWORK):
                yield f"{source.path.name}:{line} imports {name}; use the service corral.egress.client.Egress"


def foreign_plugin_imports(package: Package, named: Collection[str], packages: Mapping[str, str]) -> Iterator[str]:
    """Yield a message for each import from another plugin, except from the `api` module of a plugin in `named`.

    `packages` maps the packages of all plugins to the names of the plugins.
    """
    for source in package.sources:
        for name, line in source.imports():
            if is_under(name, package.name):
                continue
            owner = next((each for each in packages if is_under(name, each)), None)
            if owner is None:
                if name.partition(".")[0] in (BUILT_IN, CORE_PACKAGE):
                    yield f"{source.path.name}:{line} imports {name}, which is not the api of a plugin"
            elif not is_under(name, f"{owner}.api"):
                yield f"{source.path.name}:{line} imports {name}; only {owner}.api may be imported"
            elif packages[owner] not in named:
                yield f"{source.path.name}:{line} imports {name}; add {packages[owner]} to requires or wants"


def undeclared_classes(
    package: Package, base: str, declared: Iterable[type[Any]], is_concrete: Callable[[type[Any]], bool]
) -> Iterator[str]:
    """Yield a message for each concrete class of the package that derives from `base` and is not in `declared`."""
    known = set(declared)
    for module, node in package.subclasses(base):
        found = getattr(importlib.import_module(module), node.name, None)  # None if local to a function
        if inspect.isclass(found) and found not in known and is_concrete(found):
            yield f"{module}.{node.name} is not contributed by the plugin"
