"""Generates the plugin API reference: its index, one page per package, and the services page."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import itertools
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import msgspec

from corral.kernel import Kernel
from corral.plugins.record import PluginRecord
from corral.testing.markdown import table
from corral.testing.module_reference import (
    defining_source,
    first_sentence,
    module_source,
    render_definition,
    render_names,
)

SOURCES = ("plugins/corral_plugins", "marketplace/corral_marketplace", "contrib")
WHOLE_MODULES = (
    "auth.principal",
    "auth.visibility",
    "clock",
    "errors",
    "events.alerts",
    "events.event",
    "http.answers",
    "http.page",
    "http.routes",
    "ids",
    "jobs.shared_queue",
    "metrics.histogram",
    "plugin",
    "storage.blobs",
    "testing.certificates",
    "testing.conformance",
    "testing.database_servers",
    "testing.findings",
    "testing.plugin",
    "testing.plugin_folder",
    "testing.server",
    "testing.stub_servers",
)
"""The public modules that are documented completely. For other modules, only names that plugins import are listed."""
FURTHER_NAMES = {
    "auth.credentials": ("CredentialHeaders",),
    "auth.principal": ("ANY_CALLER", "PUBLIC", "SYSTEM_PRINCIPAL"),
    "database.model": ("PRIVATE_AND_ADMIN",),
    "database.unit": ("Actor",),
    "egress.client": ("MIB",),
    "egress.guard": ("HostPort", "Policy", "Profile", "read_url"),
    "egress.resolver": ("Resolver", "Unresolved"),
    "errors": ("LIMITING_CODES",),
    "events.live_feed": ("Bus", "Viewer"),
    "jobs.job": ("ItemName", "PositiveInt", "TimeOfDay", "WEEKDAYS"),
    "plugin": ("Protection", "SeriesName"),
    "cli.output": ("config_option", "json_option", "print_value"),
    "schema.fields": ("ShortText", "Title"),
    "testing.kit": ("Answer", "Client", "Kit", "make_kernel", "PASSWORD"),
}
"""Additional names in public modules that plugins outside this repository need."""
INDEX = """\
# The API for plugins

Everything that a plugin may import, with its import path. These names keep their meaning within a major release, and
`corral check` reports imports of private modules. Names that these pages do not list are internal, even in a public
module, and may change at any time. Import a name from the module under which it is listed:
`from corral.plugin import Plugin, hookimpl`.

- Services, which a plugin asks for by their type, are on a [page of their own](services.md).
- The hooks by which a plugin contributes are on the page [Hooks](hooks.md).
- [Write a plugin](../how-to/write-a-plugin.md) shows how to do the usual things with these names, and
  [Testing a plugin](testing.md) describes the test kit.
"""
SERVICES = """\
# Services

A plugin asks for a service by its type: as a parameter of the constructor of its own services and authenticators, or
of a route handler, job, schedule, subscriber, socket or metric function; in `start`, with `runtime.service(Type)`; in a
command, with `session.service(Type)`; in a test, with `kit.service(Type)`. Most plugins need only a few of the kernel's
services: `Work`, `Settings`, `Egress`, `BlobStore`, `Sealer` and `Audit`.

- A service of the kernel needs nothing else.
- A service of a plugin needs the name of the plugin in `requires` or `wants` of the class of your plugin. With
  `requires`, your plugin starts only if the other one is active. With `wants`, annotate the service as `Type | None`: a
  parameter of a function is then None while the other plugin is not active. In a service of your own, declare it as a
  class attribute, `audit: Audit | None`, which Corral sets after all services have been created.
- A protocol of the kernel that a plugin provides, such as `Audit`, needs no entry in `requires` or `wants`. Annotate it
  as `Type | None`, or name the plugin in `requires`.
- The configuration of your own plugin is passed like a service: annotate a parameter with the class that is `config` of
  your plugin class. A plugin that asks for the class of another plugin is `failed`.

Call the methods of a service within a unit of work unless the text says otherwise. `async` methods open units of their
own, so call them outside of one. To offer a service, define a protocol in your `api.py` and return
`Provide(Protocol, Implementation)` from [`corral_services`](hooks.md#corral_services).
"""
INDEX_HEAD = ("Module", "Contents", "Names")
INDEX_PLUGINS = """\
The plugin whose `api` you import must be in `requires` or `wants` of your plugin class. Events:
a subscriber names them by their [public name](events.md), so it needs the class only to decode the payload.
"""


class Service(msgspec.Struct, frozen=True, kw_only=True):
    """A service that plugins may request. `provider` is the plugin that provides it, or empty for the kernel.

    To use the service, a plugin must list the plugins in `entries` in its manifest.
    """

    module: str
    name: str
    provider: str
    entries: tuple[str, ...]

    @property
    def how_to_request(self) -> str:
        """A sentence that states which plugin provides the service and how a plugin requests it."""
        if not self.provider:
            return f"The kernel provides it: ask for `{self.name}`."
        if not self.entries:
            return f"The `{self.provider}` plugin provides it: ask for `{self.name} | None`, without an entry."
        names = ", ".join(f'"{entry}"' for entry in self.entries) + ("" if self.entries[1:] else ",")
        required, wanted = (f"`{attribute} = ({names})`" for attribute in ("requires", "wants"))
        return (
            f"The `{self.provider}` plugin provides it: ask for `{self.name}` with {required}, "
            f"or for `{self.name} | None` with {wanted}."
        )


def api_pages(kernel: Kernel, root: Path, folder: Path) -> dict[Path, str]:
    """Return the content of the index, the package pages and the services page, keyed by path."""
    listed = _listed_names(root)
    services = _services(kernel, listed)
    pages, rows = {folder / "services.md": services_page(services)}, []
    for package, modules in itertools.groupby(listed, lambda module: ".".join(module.split(".")[:2])):
        path = Path("api", f"{package.removeprefix('corral.')}.md")
        names = {module: listed[module] for module in modules}
        pages[folder / path] = _page(package, names, services)
        rows += [_index_row(module, path, names[module], services) for module in names]
    index = [INDEX, "\n## Modules of the kernel\n\n", table(INDEX_HEAD, rows)]
    rows = []
    for module, record in _plugin_modules(kernel):
        path = Path("api", "plugins", f"{record.name}.md")
        names = {module: _api_names(module)}
        pages[folder / path] = _page(module, names, services)
        rows.append(_index_row(module, path, names[module], services))
    index += ["\n## Modules of the built-in plugins\n\n", INDEX_PLUGINS, "\n", table(INDEX_HEAD, rows)]
    return {folder / "api.md": "".join(index), **pages}


def _plugin_modules(kernel: Kernel) -> Iterator[tuple[str, PluginRecord]]:
    """Yield the `api` module of each built-in plugin that has one."""
    for record in sorted(kernel.plugins, key=lambda each: each.name):
        module = f"{record.found.module.rpartition('.')[0]}.api"
        if record.found.built_in and importlib.util.find_spec(module) is not None and _api_names(module):
            yield module, record


def _services(kernel: Kernel, listed: Mapping[str, Collection[str]]) -> list[Service]:
    """Return the services that other plugins may use: the services of the kernel, then the services of each plugin."""
    found = []
    for kind, (_, owner) in kernel.container._services.items():
        module, name, provider = kind.__module__, kind.__name__, "" if owner is None else owner.name
        if module.startswith("corral."):
            if name in listed.get(module, ()):
                found.append(Service(module=module, name=name, provider=provider, entries=()))
        elif module.endswith(".api"):
            entries = tuple(dict.fromkeys((provider, module.split(".")[-2])))  # the second one owns the module
            found.append(Service(module=module, name=name, provider=provider, entries=entries))
    return sorted(found, key=lambda each: (each.provider, each.name))


def _index_row(module: str, path: Path, names: Sequence[str], services: Sequence[Service]) -> tuple[str, str, str]:
    source, section = module_source(module), f"{path}#{module.replace('.', '')}"
    linked = {each.name for each in services if each.module == module}
    cells = []
    for name in names:
        target = "services.md" if name in linked else str(path)
        cells.append(f"`{name}`" if name in source.constants else f"[`{name}`]({target}#{name.lower()})")
    return f"[`{module}`]({section})", first_sentence(source.doc()), ", ".join(cells)


def kernel_names_used_by_plugins(root: Path) -> dict[str, set[str]]:
    """Return the kernel names that plugins in the source tree use, grouped by module."""
    found: dict[str, set[str]] = defaultdict(set)
    for file in sorted(path for folder in SOURCES for path in (root / folder).rglob("*.py")):
        if "tests" not in file.relative_to(root).parts:
            for module, name in _kernel_names(ast.parse(file.read_text("utf-8"))):
                found[module].add(name)
    return found


def _kernel_names(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Yield (module, name) for each kernel name that is imported directly or used as `module.name`."""
    modules: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "corral":
            for alias in node.names:
                if importlib.util.find_spec(f"{node.module}.{alias.name}") if _is_package(str(node.module)) else None:
                    modules[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                else:
                    yield str(node.module), alias.name
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            yield modules[node.value.id], node.attr


def _is_package(module: str) -> bool:
    return hasattr(importlib.import_module(module), "__path__")


def _listed_names(root: Path) -> dict[str, list[str]]:
    """Return the names to list for each module of the kernel, in source code order."""
    found = defaultdict(set, kernel_names_used_by_plugins(root))
    for module in WHOLE_MODULES:
        found[f"corral.{module}"].update(module_source(f"corral.{module}").public_names())
    for module, names in FURTHER_NAMES.items():
        found[f"corral.{module}"].update(names)
    return {module: _in_source_order(module, names) for module, names in sorted(found.items())}


def _in_source_order(module: str, names: Iterable[str]) -> list[str]:
    order = [*module_source(module).definitions, *module_source(module).constants]
    return sorted(names, key=lambda name: (order.index(name) if name in order else len(order), name))


def _api_names(module: str) -> list[str]:
    """Return the documented names of a plugin's `api` module, or an empty list if the plugin has no such module."""
    if importlib.util.find_spec(module) is None:
        return []
    source = module_source(module)
    constants = [name for name in source.constants if not name.startswith("_")]
    return [*source.public_names(), *constants]


def _page(package: str, modules: Mapping[str, Sequence[str]], services: Sequence[Service]) -> str:
    """Return the page for a package, with one section per module. Services are linked instead of described."""
    linked = {(each.module, each.name) for each in services}
    up = "../" if package.startswith("corral.") else "../../"
    parts = [f"# The API of {package}\n"]
    for module, names in modules.items():
        parts.append(f"\n## {module}\n\n{module_source(module).doc()}\n")
        links = [f"[`{name}`]({up}services.md#{name.lower()})" for name in names if (module, name) in linked]
        if links:
            parts.append(f"\nServices of this module: {', '.join(links)}.\n")
        parts += render_names(module, [name for name in names if (module, name) not in linked])
    return "".join(parts)


def services_page(services: Sequence[Service]) -> str:
    """Return the services page, which consists of a table and one section per service."""
    rows, sections = [], []
    for each in services:
        source = defining_source(each.module, each.name)
        purpose = first_sentence(source.doc(each.name))
        provider = f"`{each.provider}`" if each.provider else "the kernel"
        entries = ", ".join(f"`{entry}`" for entry in each.entries) or "none"
        rows.append((f"[`{each.name}`](#{each.name.lower()})", f"`{each.module}`", provider, entries, purpose))
        head = f"\n## {each.name}\n\nImport: `from {each.module} import {each.name}`. {each.how_to_request}\n\n"
        sections.append(head + render_definition(source, each.name, constructor=False))
    return "".join([SERVICES, "\n", table(("Service", "Module", "Provided by", "Entry", "Purpose"), rows), *sections])
