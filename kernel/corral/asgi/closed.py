"""Operations of built-in plugins that did not come up: known without loading them, and answered with 503."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from importlib import resources
from typing import Any

import msgspec

from corral.asgi.table import Clash, Table
from corral.auth.principal import PUBLIC
from corral.errors import Problem, Unavailable
from corral.http.routes import Route
from corral.plugins.record import PluginRecord

RETRY_AFTER = 60
SOCKET = "WS "


class Closed:
    """What the table leads to instead of an endpoint; `door` says what became of the plugin."""

    public = True

    def __init__(self, loaded: PluginRecord, label: str) -> None:
        self.loaded = loaded
        method, _, path = label.partition(" ")
        self.route = Route(
            method=method, path=path, handler=self.door, tag="", needs=(PUBLIC,), plugin=loaded.name, summary=label
        )

    def door(self) -> Problem:
        """The problem that is answered."""
        return out_of_service(self.loaded)


def out_of_service(loaded: PluginRecord) -> Unavailable:
    """503 with the state of the plugin and the reason for it."""
    code = "plugin_failed" if loaded.state == "failed" else "plugin_disabled"
    detail = f"The plugin {loaded.name} is {loaded.state}: {loaded.reason or 'see the log'}."
    return Unavailable(detail, code=code, retry_after=RETRY_AFTER)


def close(table: Table, plugins: Iterable[PluginRecord], served: Iterable[Any]) -> None:
    """Add the operations of built-in plugins of which none is served. What another plugin serves stays its own."""
    up = {endpoint.route.plugin for endpoint in served}
    for loaded, label in _operations([loaded for loaded in plugins if loaded.name not in up]):
        if not label.startswith(SOCKET):
            with contextlib.suppress(Clash, ValueError):  # ValueError: another names a part of the path differently
                table.add(Closed(loaded, label))


def sockets(plugins: Iterable[PluginRecord]) -> Iterator[tuple[PluginRecord, str]]:
    """The paths of sockets of built-in plugins that did not come up."""
    for loaded, label in _operations([loaded for loaded in plugins if not loaded.active]):
        if label.startswith(SOCKET):
            yield loaded, label.removeprefix(SOCKET)


def _operations(down: list[PluginRecord]) -> Iterator[tuple[PluginRecord, str]]:
    known = built_in_paths(down)
    for loaded in down:
        for label in known.get(loaded.name, ()) if loaded.found.built_in else ():
            yield loaded, label


def built_in_paths(plugins: Iterable[PluginRecord]) -> dict[str, list[str]]:
    """`{plugin: ["GET /agents", …]}` of the `paths.json` in the packages of built-in plugins; imports no plugin."""
    paths: dict[str, list[str]] = {}
    for package in {loaded.found.package for loaded in plugins if loaded.found.built_in} - {""}:
        file = resources.files(package).joinpath("paths.json")
        if file.is_file():
            paths |= msgspec.json.decode(file.read_bytes(), type=dict[str, list[str]])
    return paths
