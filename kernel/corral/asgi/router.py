"""The router: a tree of path segments. A trailing slash is ignored, and the values of ids must be UUIDs."""

from __future__ import annotations

from typing import Any, Protocol

from corral.http.routes import Route
from corral.ids import parse_id

MAX_SEGMENT, MAX_REST = 200, 300
Match = tuple[dict[str, Any], dict[str, str]]
"""(endpoints of a path by method, values of the path parameters by name)."""


class Routed(Protocol):
    """An object that the router returns: an endpoint, or a placeholder for an endpoint of an unavailable plugin."""

    route: Route


class _Node:
    __slots__ = ("children", "methods", "name", "parameter")

    def __init__(self) -> None:
        self.children: dict[str, _Node] = {}
        self.parameter: _Node | None = None
        self.name = ""
        self.methods: dict[str, Any] = {}

    def read(self, segment: str) -> str | None:
        """Return the segment as a value of this node's parameter, or None if the segment is not a valid value."""
        if not segment or len(segment) > MAX_SEGMENT:
            return None
        return parse_id(segment) if self.name == "id" or self.name.endswith("_id") else segment


class RouteConflict(Exception):
    """The same operation (method and path) is declared twice."""

    def __init__(self, route: Route, other: Route) -> None:
        self.route, self.other = route, other
        super().__init__(f"{route.label} is already declared by {other.plugin}")


class Router:
    """Maps the path of a request to its endpoints."""

    def __init__(self) -> None:
        self._root = _Node()
        self._static: dict[str, dict[str, Any]] = {}
        self._last: dict[str, _Node] = {}  # by prefix; for paths whose only parameter is the last segment
        self._rest: dict[str, _Node] = {}  # nodes of `_last` whose parameter may contain slashes

    def add(self, endpoint: Routed) -> None:
        """Add an endpoint at every path of its route. Raises `RouteConflict` if an operation is already declared."""
        for path in endpoint.route.paths:
            node = self._descend(path)
            if endpoint.route.method in node.methods:
                raise RouteConflict(endpoint.route, node.methods[endpoint.route.method].route)
            node.methods[endpoint.route.method] = endpoint
            if "{" not in path:
                self._static[path] = node.methods
            elif "{" not in (before := path.rpartition("/")[0]):
                self._last[before] = node
                if endpoint.route.rest:
                    self._rest[before + "/"] = node

    def conflict(self, route: Route) -> Route | None:
        """Return the route that already serves the same operation as the given route, or None."""
        for path in route.paths:
            served = self._descend(path).methods.get(route.method)
            if served is not None:
                other: Route = served.route
                return other
        return None

    def find(self, path: str, raw_path: bytes = b"") -> Match | None:
        """Return the endpoints of a path, or None if there are none.

        Paths with empty segments, dot segments or encoded separators are never found.
        """
        if "//" in path or "\\" in path or "/./" in path or "/../" in path:
            return None
        found = self._find(path[:-1] if path[-1:] == "/" and len(path) > 1 else path)
        if found is None or b"%" not in raw_path:
            return found
        raw_path = raw_path.lower()
        if b"%2e" in raw_path or b"%5c" in raw_path or b"%00" in raw_path:
            return None
        return None if b"%2f" in raw_path and not any(item.route.rest for item in found[0].values()) else found

    def _find(self, path: str) -> Match | None:
        methods = self._static.get(path)
        if methods is not None:
            return methods, {}
        before, _, last = path.rpartition("/")
        leaf = self._last.get(before)  # fast path for the most frequent form, /tasks/{id}
        if leaf is not None and (value := leaf.read(last)) is not None:
            return leaf.methods, {leaf.name: value}
        found: dict[str, str] = {}
        node = self._walk(self._root, path[1:].split("/"), 0, found)
        return (node.methods, found) if node is not None else self._find_rest(path)

    def _find_rest(self, path: str) -> Match | None:
        for before, node in self._rest.items():
            if path.startswith(before) and len(path) - len(before) <= MAX_REST:
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
                    other = node.parameter.name
                    raise ValueError(f"{path}: another route calls {{{name}}} {{{other}}}; use the same name")
                node = node.parameter
            else:
                node = node.children.setdefault(segment, _Node())
        return node
