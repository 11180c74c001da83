"""The router: a tree of path segments. It ignores a trailing slash, and id parameters match only UUIDs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any, Protocol

from corral.http.routes import Route
from corral.ids import parse_id

MAX_SEGMENT, MAX_REST = 200, 300
REFUSED = (b"%2e", b"%5c", b"%00")  # encoded dots, backslashes and U+0000
Match = tuple[dict[str, Any], dict[str, str]]
"""The result of looking up a path: its endpoints, keyed by method, and the values of its parameters, keyed by name."""


class RouteTarget(Protocol):
    """An object that the router returns: an endpoint, or a placeholder for an endpoint of an unavailable plugin."""

    route: Route


class _Node:
    __slots__ = ("children", "is_id", "is_rest", "methods", "name", "parameter")

    def __init__(self, name: str = "") -> None:
        self.children: defaultdict[str, _Node] = defaultdict(_Node)
        self.parameter: _Node | None = None
        self.name, self.is_id = name, name == "id" or name.endswith("_id")
        self.is_rest = False  # the parameter matches the rest of the path, including slashes
        self.methods: dict[str, Any] = {}


class Router:
    """Maps request paths to endpoints."""

    def __init__(self) -> None:
        self._root = _Node()

    def add(self, endpoints: Iterable[RouteTarget]) -> None:
        """Add each endpoint at all paths of its route. If one endpoint cannot be added, no endpoint is added.

        Raise `ValueError` if an operation is already declared, or if two routes use different names for the same path
        parameter.
        """
        added: dict[tuple[_Node, str], RouteTarget] = {}
        for endpoint in endpoints:
            for path in endpoint.route.paths:
                node, method = self._node(path), endpoint.route.method
                if other := node.methods.get(method) or added.get((node, method)):
                    raise ValueError(f"{endpoint.route.label} is already declared by {other.route.plugin}")
                added[node, method] = endpoint
        for (node, method), endpoint in added.items():
            node.methods[method] = endpoint
            node.is_rest = node.is_rest or endpoint.route.rest

    def find(self, path: str, raw_path: bytes = b"") -> Match | None:
        """Return the endpoints of a path, or None if there are none.

        Paths with empty segments, dot segments or encoded separators are never found.
        """
        encoded = raw_path.lower()
        if any(part in path for part in ("//", "\\", "/./", "/../")) or any(code in encoded for code in REFUSED):
            return None
        found = self._walk(self._root, path[1:].removesuffix("/").split("/"), 0, {})
        is_rest = found is not None and any(item.route.rest for item in found[0].values())
        return found if is_rest or b"%2f" not in encoded else None

    def _walk(self, node: _Node, segments: list[str], at: int, values: dict[str, str]) -> Match | None:
        """Match the path segments from index `at` against this node. A fixed segment is tried before a parameter."""
        if at == len(segments):
            return (node.methods, values) if node.methods else None
        segment, parameter = segments[at], node.parameter
        child = node.children.get(segment)
        if child is not None and (found := self._walk(child, segments, at + 1, values)) is not None:
            return found
        if parameter is None:
            return None
        value = parse_id(segment) if parameter.is_id else segment
        if value and len(segment) <= MAX_SEGMENT:
            found = self._walk(parameter, segments, at + 1, {**values, parameter.name: value})
            if found is not None:
                return found
        if parameter.is_rest and len(rest := "/".join(segments[at:])) <= MAX_REST:
            return parameter.methods, {**values, parameter.name: rest}
        return None

    def _node(self, path: str) -> _Node:
        """Return the node of a path template. Create the node if necessary."""
        node = self._root
        for segment in path[1:].split("/"):
            if not segment.startswith("{"):
                node = node.children[segment]
                continue
            if node.parameter is None:
                node.parameter = _Node(segment[1:-1])
            elif node.parameter.name != segment[1:-1]:
                other = node.parameter.name
                raise ValueError(f"{path}: the parameter {segment} is named {{{other}}} elsewhere; use the same name")
            node = node.parameter
        return node
