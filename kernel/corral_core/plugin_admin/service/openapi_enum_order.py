"""Preserves the declaration order of enumeration values in the OpenAPI document."""

from __future__ import annotations

import typing
from collections.abc import Iterable, Iterator
from enum import EnumMeta
from typing import Any, Literal

import msgspec

from corral_core.plugin_admin.service.openapi_descriptions import field_types


def enum_orders(kinds: Iterable[Any], seen: set[Any]) -> Iterator[tuple[frozenset[Any], list[Any]]]:
    """Yield the values of each enumeration, both as a set and in declaration order.

    The order is needed because msgspec sorts the values in schemas.
    """
    for kind in kinds:
        if isinstance(kind, EnumMeta):
            members = [member.value for member in typing.cast(Iterable[Any], kind)]
            yield frozenset(members), members
        elif typing.get_origin(kind) is Literal:
            yield frozenset(typing.get_args(kind)), list(typing.get_args(kind))
        elif args := typing.get_args(kind):
            yield from enum_orders((typing.get_origin(kind), *args), seen)
        elif isinstance(kind, type) and issubclass(kind, msgspec.Struct) and kind not in seen:
            seen.add(kind)
            yield from enum_orders(field_types(kind), seen)


def reorder(schema: Any, orders: dict[frozenset[Any], list[Any]]) -> Any:
    """Return the schema with the values of each enumeration in the order given in `orders`."""
    if isinstance(schema, list):
        return [reorder(each, orders) for each in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: reorder(each, orders) for key, each in schema.items()}
    if isinstance(values := schema.get("enum"), list):
        result["enum"] = orders.get(frozenset(values), values)
    return result
