"""The expected return types of contributed callables, read from annotations at boot."""

from __future__ import annotations

import collections.abc
import functools
import inspect
import types
import typing
from typing import Any

import msgspec

from corral.http.handler_signature import hints, union_parts

AWAITABLES = (collections.abc.Awaitable, collections.abc.Coroutine)


class ExpectedReturn(typing.NamedTuple):
    """The kind of value that a callable is expected to return.

    `kinds` contains the allowed classes; None allows any value. `awaited` is True if the callable must return an
    awaitable of such a value, False if it must not, and None if both are allowed.
    """

    kinds: tuple[type, ...] | None = None
    awaited: bool | None = None

    @property
    def accepted_classes(self) -> tuple[type, ...]:
        """The classes whose instances are accepted without further checks."""
        wrapped = ("__await__", "__anext__")  # a guard wraps instances of classes with these methods
        kinds = () if self.awaited else self.kinds or ()
        return tuple(kind for kind in kinds if not any(hasattr(kind, name) for name in wrapped))

    def fits(self, value: Any) -> bool:
        """Return whether a value is an instance of one of the expected classes.

        An int is accepted where a float is expected.
        """
        return self.kinds is None or isinstance(value, self.kinds) or (float in self.kinds and type(value) is int)

    def class_names(self) -> str:
        """Return the names of the expected classes, for error messages."""
        return " or ".join(kind.__name__ for kind in self.kinds or ())


ANYTHING = ExpectedReturn()
NOT_AWAITED = ExpectedReturn(None, False)


@functools.lru_cache(maxsize=1024)
def expected_returns(kind: Any, protocol: Any) -> dict[str, ExpectedReturn]:
    """Return the expected return values of the callables in objects of type `kind`, keyed by the callables' names.

    The callables are the fields of a struct, or the public methods of any other class. For methods, the expected values
    are read from the annotations of `protocol`. The result is shared, so callers must not change it.
    """
    if issubclass(kind, msgspec.Struct):
        fields = {field: of_field(annotation) for field, annotation in hints(kind).items()}
        return {field: expected for field, expected in fields.items() if expected is not None}
    methods = inspect.getmembers(kind, inspect.isroutine)
    return {name: expected_return(protocol, name) for name, _ in methods if not name.startswith("_")}


def expected_return(protocol: Any, name: str) -> ExpectedReturn:
    """Return the expected return value of a method, according to its annotation in the protocol.

    If `protocol` is a union, its first member that has the method is used.
    """
    method = next((getattr(each, name) for each in union_parts(protocol) if hasattr(each, name)), None)
    try:
        returned = hints(method).get("return", Any) if inspect.isfunction(method) else Any
    except (NameError, TypeError):  # a name that is imported for type checkers only
        returned = Any
    return ExpectedReturn(_classes_of(returned), True) if inspect.iscoroutinefunction(method) else _expected(returned)


def of_field(annotation: Any) -> ExpectedReturn | None:
    """Return the expected return value for a field annotated `Callable[..., X]` or `Callable[..., X] | None`.

    For any other annotation, return None.
    """
    for option in union_parts(annotation):
        if collections.abc.Callable in (option, typing.get_origin(option)):
            return _expected((typing.get_args(option) or (Any,))[-1])
    return None


def _expected(returned: Any) -> ExpectedReturn:
    if typing.get_origin(returned) in AWAITABLES:
        return ExpectedReturn(_classes_of(typing.get_args(returned)[-1]), True)
    kinds = _classes_of(returned)
    return ExpectedReturn(kinds, None if kinds is None else False)


def _classes_of(annotation: Any) -> tuple[type, ...] | None:
    """Return the classes that an annotation allows, or None if it allows any value."""
    kinds: list[type] = []
    for option in union_parts(annotation):
        kind = types.NoneType if option is None else typing.get_origin(option) or option
        if kind is typing.Literal:
            kinds += [type(value) for value in typing.get_args(option)]
        elif kind is Any or not isinstance(kind, type) or getattr(kind, "_is_protocol", False):
            return None
        else:
            kinds.append(kind)
    return tuple(dict.fromkeys(kinds))
