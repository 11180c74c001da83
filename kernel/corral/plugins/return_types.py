"""Expected return types of contributed callables, read from annotations at boot."""

from __future__ import annotations

import collections.abc
import inspect
import types
import typing
from collections.abc import Callable
from typing import Any

from corral.http.signature import hints

AWAITED = (collections.abc.Awaitable, collections.abc.Coroutine)


class Expected(typing.NamedTuple):
    """The expected result of a callable.

    `kinds` are the allowed classes; None allows any value. `awaited` is True if the callable must return an awaitable
    of such a value, False if it must not, and None if both are allowed.
    """

    kinds: tuple[type, ...] | None = None
    awaited: bool | None = None

    @property
    def accepted(self) -> tuple[type, ...]:
        """The classes whose instances are accepted without further checks."""
        wrapped = ("__await__", "__anext__")  # a guard wraps instances of classes with these methods
        kinds = () if self.awaited else self.kinds or ()
        return tuple(kind for kind in kinds if not any(hasattr(kind, name) for name in wrapped))

    def fits(self, value: Any) -> bool:
        """Return whether a value has one of the expected classes. An int is accepted where a float is expected."""
        return self.kinds is None or isinstance(value, self.kinds) or (float in self.kinds and type(value) is int)

    def names(self) -> str:
        """Return the names of the expected classes, for error messages."""
        return " or ".join(kind.__name__ for kind in self.kinds or ())


ANYTHING = Expected()
NOT_AWAITED = Expected(None, False)


def of_method(protocol: Any, name: str) -> Expected:
    """Return the expected result of a method, from the annotations of the protocol that declares it."""
    method = getattr(protocol, name, None)
    if not inspect.isfunction(method):
        return ANYTHING
    try:
        told = hints(method).get("return", Any)
    except (NameError, TypeError):  # a name that is imported for type checkers only
        return ANYTHING
    if inspect.iscoroutinefunction(method):
        return Expected(_kinds(told), True)
    return _of(told)


def of_field(annotated: Any) -> Expected | None:
    """Return the expected result of a field annotated `Callable[..., X]` or `Callable[..., X] | None`.

    For any other annotation, return None.
    """
    for option in _options(annotated):
        if typing.get_origin(option) is collections.abc.Callable:
            return _of(typing.get_args(option)[-1])
        if option is Callable:
            return ANYTHING
    return None


def _of(told: Any) -> Expected:
    if typing.get_origin(told) in AWAITED:
        return Expected(_kinds(typing.get_args(told)[-1]), True)
    if told is Any or isinstance(told, typing.TypeVar):
        return ANYTHING
    if (typing.get_origin(told) or told) in (collections.abc.AsyncIterator, collections.abc.AsyncGenerator):
        return Expected(_kinds(told), False)
    kinds = _kinds(told)
    return Expected(kinds, None if kinds is None else False)


def _options(annotated: Any) -> tuple[Any, ...]:
    if typing.get_origin(annotated) in (typing.Union, types.UnionType):
        return typing.get_args(annotated)
    return (annotated,)


def _kinds(told: Any) -> tuple[type, ...] | None:
    found: list[type] = []
    for option in _options(told):
        plain = types.NoneType if option is None else typing.get_origin(option) or option
        if typing.get_origin(option) is typing.Literal:
            found += [type(value) for value in typing.get_args(option)]
        elif not isinstance(plain, type) or getattr(plain, "_is_protocol", False):
            return None
        else:
            found.append(plain)
    return tuple(dict.fromkeys(found))
