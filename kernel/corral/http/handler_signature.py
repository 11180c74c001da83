"""Reads the signatures of handlers at boot: the request parts and services that they take, and their return types."""

from __future__ import annotations

import functools
import inspect
import types
import typing
from collections.abc import Sequence
from typing import Any

import msgspec

from corral.auth.principal import Principal
from corral.http.answers import Answer, Encoded, IfMatch, Request, Stream, Text, Wait
from corral.http.page import Page
from corral.http.routes import Route

PARTS: dict[Any, str] = {Principal: "caller", IfMatch: "if_match", Request: "request"}
NO_SHAPES = (Wait, Text, Stream, Encoded, types.NoneType)


class Signature(msgspec.Struct, frozen=True, kw_only=True):
    """The signature of a handler.

    `caller`, `if_match` and `request` are the names of the parameters that receive the `Principal`, the `IfMatch` and
    the `Request`, or None. `services` maps the names of parameters to the type of the service and whether it is
    optional. `returned` contains the members of the handler's return type, which may be a union; `answers` contains the
    types of response bodies among them.
    """

    body: Any = None
    query: Any = None
    caller: str | None = None
    if_match: str | None = None
    request: str | None = None
    services: dict[str, tuple[Any, bool]] = {}
    returned: tuple[Any, ...] = ()
    answers: tuple[Any, ...] = ()

    @property
    def returns_version(self) -> bool:
        """Whether the response body has a `version` field, from which the `ETag` is derived."""
        shape = self.answers[0] if len(self.answers) == 1 else None
        return "version" in getattr(shape, "__struct_fields__", ()) and hints(shape).get("version") is int


@functools.lru_cache(maxsize=4096)
def _resolve_hints(function: Any) -> tuple[dict[str, Any], dict[str, tuple[Any, bool]]]:
    kinds = typing.get_type_hints(function, include_extras=True)
    return kinds, {name: without_none(kind) for name, kind in kinds.items() if name != "return"}


def _all_hints(function: Any) -> tuple[dict[str, Any], dict[str, tuple[Any, bool]]]:
    """Return the annotations of a function in two forms: as `hints` returns them, and as `optional_hints` does."""
    function = getattr(function, "__func__", function)
    plain = isinstance(function, type) or getattr(function, "__closure__", function) is None
    try:  # the cache would keep a closure alive with everything it refers to
        return _resolve_hints(function) if plain else _resolve_hints.__wrapped__(function)
    except NameError as error:
        where = f"{function.__module__}.{function.__qualname__}"
        raise TypeError(f"{where}: {error}; import the type outside TYPE_CHECKING") from None


def hints(function: Any) -> dict[str, Any]:
    """Return the resolved annotations of a function. The result is shared, so callers must not change it.

    If an annotation cannot be resolved, raise a `TypeError` that names it.
    """
    return _all_hints(function)[0]


def optional_hints(function: Any) -> dict[str, tuple[Any, bool]]:
    """Return the annotations of parameters: `X | None` as `(X, True)`, and any other annotation `X` as `(X, False)`.

    Like the result of `hints`, the result is shared, so callers must not change it.
    """
    return _all_hints(function)[1]


def union_parts(kind: Any) -> tuple[Any, ...]:
    """Return the members of a union. For any other type, return a tuple that contains only this type."""
    is_union = not isinstance(kind, type) and typing.get_origin(kind) in (types.UnionType, typing.Union)
    return typing.get_args(kind) if is_union else (kind,)


def without_none(kind: Any) -> tuple[Any, bool]:
    """Return `(X, True)` for `X | None`, and `(kind, False)` for any other type."""
    parts = union_parts(kind)
    rest = [part for part in parts if part is not types.NoneType]
    return (rest[0], True) if len(rest) == 1 < len(parts) else (kind, False)


def read_signature(route: Route) -> Signature:
    """Return the signature of a route's handler.

    If the signature is invalid, raise a `TypeError` that describes the mistake.
    """
    kinds = hints(route.handler)
    if "return" not in kinds:
        raise TypeError(f"{route.label}: the handler has no return annotation")
    names = inspect.signature(route.handler).parameters
    in_path = route.path_parameters
    if missing := set(in_path).difference(names):
        raise TypeError(f"{route.label}: the handler has no parameters for the path parameters {sorted(missing)}")
    parts: dict[str, Any] = {"services": {}}
    for name in names:
        if name not in kinds:
            raise TypeError(f"{route.label}: parameter {name} has no annotation")
        kind = kinds[name]
        if name in ("body", "query"):
            parts[name] = route.multipart if name == "body" and route.multipart is not None else kind
        elif kind in PARTS:
            parts[PARTS[kind]] = name
        elif name not in in_path:
            parts["services"][name] = without_none(kind)
    returned = union_parts(kinds["return"])
    shapes = (part for part in returned if part not in NO_SHAPES)
    bare = (typing.get_args(part)[0] if typing.get_origin(part) is Answer else part for part in shapes)
    answers = (each for part in bare for each in union_parts(part))
    return Signature(**parts, returned=returned, answers=tuple(dict.fromkeys(answers)))


def page_item_type(kind: Any) -> Any:
    """Return the item type of a `Page`, or any other type unchanged.

    msgspec must not see pages, because it cannot distinguish `Page[X]` for two different classes named X.
    """
    return typing.get_args(kind)[0] if typing.get_origin(kind) is Page else kind


def shape_schemas(
    operations: Sequence[tuple[Route, Signature]], *more: Any
) -> tuple[dict[Any, dict[str, Any]], dict[str, dict[str, Any]]]:
    """Return the JSON Schemas of all request and response types, and the components to which the schemas refer.

    The schemas are keyed by type, and include those of the types in `more`. Raise a `TypeError` that names the route if
    one of its request or response types cannot be described.
    """
    kinds = dict.fromkeys(more)
    for _, signature in operations:
        kinds |= dict.fromkeys([signature.body, signature.query, *map(page_item_type, signature.answers)])
    try:
        schemas, named = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    except (TypeError, KeyError) as error:
        for operation in operations if len(operations) > 1 else ():
            shape_schemas([operation], *more)  # raises the error with the route's name
        is_one = len(operations) == 1
        where = operations[0][0].label if is_one else "generic shapes contain two shapes with the same name"
        raise TypeError(f"{where}: {error}") from None
    return dict(zip(kinds, schemas, strict=True)), named
