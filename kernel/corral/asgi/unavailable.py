"""Creates the 503 responses for operations of built-in plugins that are not running.

The list of operations is read from files, so the plugins need not be imported.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib import resources

import msgspec

from corral.auth.principal import PUBLIC
from corral.errors import Unavailable
from corral.http.routes import Route
from corral.plugins.record import PluginRecord


class UnavailableEndpoint:
    """A placeholder in the router for an endpoint of a plugin that is not running."""

    public = True

    def __init__(self, loaded: PluginRecord, method: str, path: str) -> None:
        self.unavailable = loaded
        self.route = Route(
            method=method, path=path, handler=plugin_unavailable, tag="", needs=(PUBLIC,), plugin=loaded.name
        )


def plugin_unavailable(loaded: PluginRecord) -> Unavailable:
    """Return a 503 problem that names the state of the plugin, the reason for this state, and what to do."""
    code = "plugin_failed" if loaded.state == "failed" else "plugin_disabled"
    detail = f"The plugin {loaded.name} is {loaded.state}: {loaded.reason or 'see the log'}."
    remedy = "enable it: corral plugins enable" if loaded.state == "disabled" else "look at it: corral plugins show"
    return Unavailable(f"{detail} Ask an admin to {remedy} {loaded.name}", code=code, retry_after=60)


def unavailable_operations(plugins: Iterable[PluginRecord]) -> Iterator[tuple[PluginRecord, str]]:
    """Yield (plugin, operation) for each operation of a built-in plugin that is not running.

    An operation has the form `GET /agents`, or `WS /ws` for a WebSocket.
    """
    down = [loaded for loaded in plugins if loaded.found.built_in and not loaded.active]
    known = built_in_operations(down)
    for loaded in down:
        for operation in known.get(loaded.name, ()):
            yield loaded, operation


def built_in_operations(plugins: Iterable[PluginRecord]) -> dict[str, list[str]]:
    """Return the operations of built-in plugins as `{plugin: ["GET /agents", …]}`.

    The operations are read from `paths.json` in the plugins' packages; no plugin is imported.
    """
    paths: dict[str, list[str]] = {}
    for package in {loaded.found.package for loaded in plugins if loaded.found.built_in} - {""}:
        file = resources.files(package).joinpath("paths.json")
        if file.is_file():
            paths |= msgspec.json.decode(file.read_bytes(), type=dict[str, list[str]])
    return paths
