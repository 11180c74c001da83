"""Reads a handler's signature once, at boot: what comes from the request, what from the container, what goes out."""

from __future__ import annotations

import functools
import inspect
import types
import typing
from collections.abc import Callable
from typing import Any

import msgspec

from corral.auth.principal import Principal
from corral.http.answers import Answer, Encoded, IfMatch, Request, Stream, Text, Wait
from corral.http.page import Page
from corral.http.routes import Route


class Signature(msgspec.Struct, frozen=True, kw_only=True):
    """`services` maps parameters to (type, optional); `returns` is the shape of the answer (None: 204 or text)."""

    body: Any = None
    query: Any = None
    path: tuple[str, ...] = ()
    caller: str | None = None
    if_match: str | None = None
    request: str | None = None
    services: dict[str, tuple[Any, bool]] = {}
    returns: Any = None
    waits: bool = False
    text: bool = False
    streams: bool = False

    @property
    def item(self) -> Any:
        """The shape inside a `Page`, or None."""
        return typing.get_args(self.returns)[0] if typing.get_origin(self.returns) is Page else None

    @property
    def versioned(self) -> bool:
        """Whether the answer carries a version, and so an ETag."""
        fields = getattr(self.returns, "__struct_fields__", ())
        return "version" in fields and _resolved(self.returns).get("version") is int


@functools.lru_cache(maxsize=2048)
def _resolved(function: Callable[..., Any]) -> dict[str, Any]:
    return typing.get_type_hints(function, include_extras=True)


def hints(function: Callable[..., Any]) -> dict[str, Any]:
    """Resolved annotations, not to be changed; a name that cannot be resolved is a `TypeError` that says which."""
    function = getattr(function, "__func__", function)
    plain = isinstance(function, type) or getattr(function, "__closure__", function) is None
    try:  # a closure would be kept with all that it leads to
        return _resolved(function) if plain else _resolved.__wrapped__(function)
    except NameError as error:
        raise TypeError(f"{function.__module__}.{function.__qualname__}: {error} (import it for real)") from None


def without_none(kind: Any) -> tuple[Any, bool]:
    """`X | None` as `(X, True)`, anything else as `(kind, False)`."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        rest = [part for part in typing.get_args(kind) if part is not types.NoneType]
        if len(rest) == 1 and len(rest) < len(typing.get_args(kind)):
            return rest[0], True
    return kind, False


def read(route: Route) -> Signature:
    """The signature of a route's handler. Raises `TypeError` naming what is wrong with it."""
    kinds = hints(route.handler)
    if "return" not in kinds:
        raise TypeError(f"{route.label}: the handler has no return annotation")
    found: dict[str, Any] = {"services": {}, "path": ()}
    for name in inspect.signature(route.handler).parameters:
        if name not in kinds:
            raise TypeError(f"{route.label}: parameter {name} has no annotation")
        _place(route, name, kinds[name], found)
    missing = set(route.names) - set(found["path"])
    if missing:
        raise TypeError(f"{route.label}: the handler does not take {sorted(missing)} of its path")
    return Signature(**found, **_answer(kinds["return"]))


def _place(route: Route, name: str, kind: Any, found: dict[str, Any]) -> None:
    if name in ("body", "query"):
        found[name] = kind
    elif name in route.names:
        found["path"] = (*found["path"], name)
    elif kind is Principal:
        found["caller"] = name
    elif kind is IfMatch:
        found["if_match"] = name
    elif kind is Request:
        found["request"] = name
    else:
        found["services"][name] = without_none(kind)


def _answer(kind: Any) -> dict[str, Any]:
    parts = list(typing.get_args(kind)) if typing.get_origin(kind) in (types.UnionType, typing.Union) else [kind]
    answer: dict[str, Any] = {}
    shapes = []
    for part in parts:
        if part is Wait:
            answer["waits"] = True
        elif part is Text:
            answer["text"] = True
        elif part is Stream:
            answer["streams"] = True
        elif part is Encoded:
            continue
        elif typing.get_origin(part) is Answer:
            shapes.append(typing.get_args(part)[0])
        elif part is not types.NoneType:
            shapes.append(part)
    unique = list(dict.fromkeys(shapes))
    answer["returns"] = None if not unique else unique[0] if len(unique) == 1 else typing.Union[tuple(unique)]  # noqa: UP007  # built at run time
    return answer
