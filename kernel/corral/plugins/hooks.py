"""What a hook asks for, read of its specification, and whether a plugin gave that."""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from corral.http.signature import hints


def asked_for(spec: Callable[..., Any]) -> Any:
    """What a hook's contributions shall be: X of `-> Iterable[X]`."""
    try:
        return (typing.get_args(hints(spec).get("return")) or (None,))[0]
    except TypeError:  # a name that is imported for type checkers only
        return None


def given(spec: Callable[..., Any], answers: Iterable[Any]) -> list[Any]:
    """The items of all answers to a hook. Raises `TypeError` for what it does not ask for."""
    items: list[Any] = []
    for answer in answers:
        if isinstance(answer, (str, bytes)) or not isinstance(answer, Iterable):
            raise TypeError(f"{spec.__name__} returned {type(answer).__name__}, not a list")
        items.extend(answer)
    judge(spec.__name__, items, asked_for(spec))
    return items


def judge(where: str, items: Iterable[Any], asked: Any) -> None:
    """Raise `TypeError` unless all are of that kind, and shapes among them have what their fields say."""
    union = typing.get_origin(asked) in (typing.Union, types.UnionType)
    for item in items:
        if not any(_is_of(item, option) for option in (typing.get_args(asked) if union else (asked,))):
            raise TypeError(f"{where} has {item!r}, which is no {getattr(asked, '__name__', asked)}")
        if isinstance(item, msgspec.Struct):
            try:
                msgspec.convert(msgspec.structs.asdict(item), type(item))
            except msgspec.ValidationError as error:
                raise TypeError(f"{where} has {item!r}, of which is wrong: {error}") from None


def _is_of(item: Any, asked: Any) -> bool:
    """A protocol that cannot be looked for at run time is taken as it is."""
    kind = typing.get_origin(asked) or asked
    base = typing.get_args(asked)[0] if kind is type else kind
    known = isinstance(base, type) and not getattr(base, "_is_protocol", False)
    if kind is type:
        return isinstance(item, type) and (not known or issubclass(item, base))
    if not known and not getattr(kind, "_is_runtime_protocol", False):
        return True
    return isinstance(item, kind) and not isinstance(item, type)
