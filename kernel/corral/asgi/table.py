"""The route table: a tree of path segments. Both slash forms are the same operation; ids must be ids."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from corral.http.routes import Route
from corral.ids import parse_id

BASE = "/api/v1"
LONGEST_REST = 300


class Served(Protocol):
    """What the table leads to."""

    route: Route


class _Node:
    __slots__ = ("children", "methods", "name", "parameter")

    def __init__(self) -> None:
        self.children: dict[str, _Node] = {}
        self.parameter: _Node | None = None
        self.name = ""
        self.methods: dict[str, Any] = {}

    def read(self, segment: str) -> str | None:
        """What the segment says as the value of this parameter; None when it cannot be one."""
        if not segment or len(segment) > 200:
            return None
        return parse_id(segment) if self.name == "id" or self.name.endswith("_id") else segment


class Clash(Exception):
    """Two plugins declare one operation."""

    def __init__(self, route: Route, other: Route) -> None:
        self.route, self.other = route, other
        super().__init__(f"{route.label} is declared by {other.plugin} already")


class Table:
    """Finds the endpoints of a path: `find(path)` gives `(methods, parameters)` or None."""

    def __init__(self) -> None:
        self._root = _Node()
        self._static: dict[str, dict[str, Any]] = {}
        self._last: dict[str, _Node] = {}  # by what stands before a parameter that is the only one and comes last
        self._rest: dict[str, _Node] = {}  # the same, of those that take slashes too

    def add(self, endpoint: Served) -> None:
        """Add an endpoint under the base path, and at the root if its route says so. Raises `Clash`."""
        for path in paths(endpoint.route):
            node = self._descend(path)
            if endpoint.route.method in node.methods:
                raise Clash(endpoint.route, node.methods[endpoint.route.method].route)
            node.methods[endpoint.route.method] = endpoint
            if "{" not in path:
                self._static[path] = node.methods
            elif "{" not in (before := path.rpartition("/")[0]):
                self._last[before] = node
                if endpoint.route.rest:
                    self._rest[before + "/"] = node

    def clash(self, route: Route) -> tuple[Route, Route] | None:
        """The route that is served already where this one would be, if there is one."""
        for path in paths(route):
            served = self._descend(path).methods.get(route.method)
            if served is not None:
                return route, served.route
        return None

    def find(self, path: str) -> tuple[dict[str, Any], dict[str, str]] | None:
        """The methods served at a path and the values of its names."""
        if path[-1:] == "/" and len(path) > 1:
            path = path[:-1]
        methods = self._static.get(path)
        if methods is not None:
            return methods, {}
        before, _, last = path.rpartition("/")
        leaf = self._last.get(before)  # /tasks/{id}: the most frequent form by far
        if leaf is not None and (value := leaf.read(last)) is not None:
            return leaf.methods, {leaf.name: value}
        found: dict[str, str] = {}
        node = self._walk(self._root, path[1:].split("/"), 0, found)
        return (node.methods, found) if node is not None else self._find_rest(path)

    def _find_rest(self, path: str) -> tuple[dict[str, Any], dict[str, str]] | None:
        for before, node in self._rest.items():
            if path.startswith(before) and len(path) - len(before) <= LONGEST_REST:
                return node.methods, {node.name: path[len(before) :]}
        return None

    def _walk(self, node: _Node, segments: list[str], index: int, found: dict[str, str]) -> _Node | None:
        if index == len(segments):
            return node if node.methods else None
        segment = segments[index]
        child = node.children.get(segment)
        if child is not None:
            reached = self._walk(child, segments, index + 1, found)
            if reached is not None:
                return reached
        child = node.parameter
        value = child.read(segment) if child is not None else None
        if child is None or value is None:
            return None
        reached = self._walk(child, segments, index + 1, found)
        if reached is not None:
            found[child.name] = value
        return reached

    def _descend(self, path: str) -> _Node:
        node = self._root
        for segment in path[1:].split("/"):
            if segment.startswith("{"):
                name = segment[1:-1]
                if node.parameter is None:
                    node.parameter = _Node()
                    node.parameter.name = name
                elif node.parameter.name != name:
                    raise ValueError(f"{path}: the name {{{name}}} is {{{node.parameter.name}}} in another route")
                node = node.parameter
            else:
                node = node.children.setdefault(segment, _Node())
        return node


def paths(route: Route) -> Iterator[str]:
    """Where a route answers, without trailing slashes."""
    yield BASE + route.path
    if route.root:
        yield route.path
