"""Responses (503) for operations of built-in plugins that do not run.

The operations are known without importing the plugins.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from importlib import resources
from typing import Any

import msgspec

from corral.asgi.router import RouteConflict, Router
from corral.auth.principal import PUBLIC
from corral.errors import Unavailable
from corral.http.routes import Route
from corral.plugins.record import PluginRecord

RETRY_AFTER = 60
SOCKET = "WS "


class UnavailableEndpoint:
    """A placeholder in the router for an endpoint of a plugin that does not run."""

    public = True

    def __init__(self, loaded: PluginRecord, label: str) -> None:
        self.loaded = loaded
        method, _, path = label.partition(" ")
        self.route = Route(method=method, path=path, handler=self.unavailable, tag="", needs=(PUBLIC,), summary=label)
        self.route.plugin = loaded.name

    def unavailable(self) -> Unavailable:
        """Return the problem to respond with."""
        return plugin_unavailable(self.loaded)


def plugin_unavailable(loaded: PluginRecord) -> Unavailable:
    """Return a 503 problem that names the state of the plugin and its reason."""
    code = "plugin_failed" if loaded.state == "failed" else "plugin_disabled"
    detail = f"The plugin {loaded.name} is {loaded.state}: {loaded.reason or 'see the log'}."
    return Unavailable(detail, code=code, retry_after=RETRY_AFTER)


def add_unavailable(router: Router, plugins: Iterable[PluginRecord], served: Iterable[Any]) -> None:
    """Add placeholders for the operations of built-in plugins that serve no endpoint.

    An operation that another plugin already serves is left unchanged.
    """
    serving = {endpoint.route.plugin for endpoint in served}
    for loaded, label in _operations([loaded for loaded in plugins if loaded.name not in serving]):
        if not label.startswith(SOCKET):
            with contextlib.suppress(RouteConflict, ValueError):  # ValueError: another route names the id differently
                router.add(UnavailableEndpoint(loaded, label))


def unavailable_sockets(plugins: Iterable[PluginRecord]) -> Iterator[tuple[PluginRecord, str]]:
    """Yield (plugin, path) of each WebSocket of the built-in plugins that do not run."""
    for loaded, label in _operations([loaded for loaded in plugins if not loaded.active]):
        if label.startswith(SOCKET):
            yield loaded, label.removeprefix(SOCKET)


def _operations(down: list[PluginRecord]) -> Iterator[tuple[PluginRecord, str]]:
    known = built_in_paths(down)
    for loaded in down:
        for label in known.get(loaded.name, ()) if loaded.found.built_in else ():
            yield loaded, label


def built_in_paths(plugins: Iterable[PluginRecord]) -> dict[str, list[str]]:
    """Return the operations of built-in plugins as `{plugin: ["GET /agents", …]}`.

    The operations are read from `paths.json` in the packages of the plugins; no plugin is imported.
    """
    paths: dict[str, list[str]] = {}
    for package in {loaded.found.package for loaded in plugins if loaded.found.built_in} - {""}:
        file = resources.files(package).joinpath("paths.json")
        if file.is_file():
            paths |= msgspec.json.decode(file.read_bytes(), type=dict[str, list[str]])
    return paths
