"""The state of all objects that can be reached from some roots: it is recorded once, and put back any number of times.

State is the content of dictionaries, lists, sets and deques, the attributes of instances, the variables that inner
functions share, and the results that caches keep. Classes, modules and module-level variables are not part of it,
because all kernels of a process share them.
"""

from __future__ import annotations

import functools
import gc
import operator
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import PurePath
from typing import Annotated, Any

import msgspec

from corral.http.routes import Route, Routes
from corral.http.signature import Signature

ATOMS = frozenset({str, bytes, int, float, complex, bool, types.NoneType, types.NotImplementedType, types.EllipsisType})
ALIASES = (types.GenericAlias, types.UnionType, type(list[int]), type(Any | None), type(Annotated[int, ""]).__mro__[1])
SHARED = (type, types.ModuleType, types.BuiltinFunctionType, PurePath, Route, Routes, Signature, *ALIASES)
"""Types whose objects never change, or belong to the whole process."""
CONSTANT = (tuple, frozenset, types.MethodType, types.MappingProxyType, types.FunctionType, functools.partial)
"""Types whose objects never change themselves, but refer to others that may."""
EXTENSIONS = ("_thread", "datetime", "decimal", "msgspec", "re", "uuid", "weakref", "zoneinfo")
"""Modules of types without Python attributes, the objects of which have no state, or none outside a call."""
STATELESS = frozenset(
    {"object", "AhoCorasick", "BytesAhoCorasick", "range", "slice", "property", "method-wrapper", "wrapper_descriptor"}
)
"""The names of such types in `builtins`, where the patterns of the redactor are as well."""
CELL: Any = types.CellType.__dict__["cell_contents"]
UNSET: Any = object()


class UnknownState(Exception):
    """An object has a state that cannot be recorded, for example because it is a running thread."""


class ObjectState:
    """The recorded state of the objects that can be reached from `roots` without passing an object of `opaque`.

    Raise `UnknownState` for an object of an extension module that may have a state.
    """

    def __init__(self, roots: Iterable[object], *, opaque: Iterable[object] = ()) -> None:
        self._seen: dict[int, Any] = {id(each): each for each in opaque}  # keeps them, so that numbers are unique
        self._mappings: list[tuple[Any, dict[Any, Any]]] = []
        self._sequences: list[tuple[Any, list[Any]]] = []
        self._sets: list[tuple[set[Any], set[Any]]] = []
        self._slots: list[tuple[Any, Any, Any]] = []
        self._structs: list[tuple[Any, Any, tuple[Any, ...]]] = []
        self._caches: list[Any] = []
        pending = [*roots]
        while pending:
            each = pending.pop()
            if type(each) not in ATOMS and id(each) not in self._seen:
                self._seen[id(each)] = each
                pending.extend(self._record(each))

    def restore(self) -> None:
        """Put the recorded state back."""
        for mapping, items in self._mappings:
            if not _is_same(mapping, items):
                mapping.clear()
                mapping.update(items)
        for sequence, values in self._sequences:
            if not (len(sequence) == len(values) and all(map(operator.is_, sequence, values))):
                sequence.clear()
                sequence.extend(values)
        for elements, members in self._sets:
            elements.clear()
            elements.update(members)
        for struct, read, fields in self._structs:
            if not all(map(operator.is_, read(struct), fields)):
                for name, value in zip(struct.__struct_fields__, fields, strict=True):
                    setattr(struct, name, value)
        for each, slot, value in self._slots:
            if _read(slot, each) is not value:
                slot.__delete__(each) if value is UNSET else slot.__set__(each, value)
        for cache in self._caches:
            cache.cache_clear()

    def _record(self, each: Any) -> Iterator[Any]:
        """Record the state of one object, and yield the objects to which it refers."""
        kind: Any = type(each)
        if isinstance(each, SHARED):
            return
        if issubclass(kind, functools._lru_cache_wrapper):
            self._caches.append(each)
            return
        if issubclass(kind, types.FunctionType):
            yield from (each.__closure__, each.__defaults__, each.__kwdefaults__, getattr(each, "__wrapped__", None))
            return
        is_constant = _is_constant(kind)
        known = is_constant or self._record_content(each)
        if not is_constant and (attributes := _attributes(each)) is not None:
            self._seen[id(attributes)] = attributes
            self._mappings.append((attributes, dict(attributes)))
            yield from attributes.values()
            known = True
        if issubclass(kind, msgspec.Struct) and not kind.__struct_config__.frozen:
            self._structs.append((each, read := _reader(kind), read(each)))
            known = True
        for slot in _slots(kind):
            self._slots.append((each, slot, _read(slot, each)))
            known = True
        if not known and not _is_stateless(kind):
            raise UnknownState(f"{kind.__module__}.{kind.__qualname__}: {each!r:.200}")
        yield from (other for other in gc.get_referents(each) if not isinstance(other, type))

    def _record_content(self, each: Any) -> bool:
        """Record the content of a container, and return whether the object is one."""
        if isinstance(each, dict):
            self._mappings.append((each, dict(each)))
        elif isinstance(each, (list, deque)):
            self._sequences.append((each, list(each)))
        elif isinstance(each, set):
            self._sets.append((each, set(each)))
        elif isinstance(each, types.CellType):
            self._slots.append((each, CELL, _read(CELL, each)))
        else:
            return False
        return True


def _attributes(each: Any) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = object.__getattribute__(each, "__dict__")
    except AttributeError:
        return None
    return found if type(found) is dict else None


def _is_constant(kind: type) -> bool:
    return issubclass(kind, CONSTANT) or (issubclass(kind, msgspec.Struct) and kind.__struct_config__.frozen)


def _is_stateless(kind: type) -> bool:
    if kind.__module__ == "builtins":
        return kind.__name__ in STATELESS
    return kind.__module__.partition(".")[0] in EXTENSIONS


@functools.cache
def _reader(kind: type[msgspec.Struct]) -> Callable[[Any], tuple[Any, ...]]:
    """Return a function that reads all fields of a struct."""
    names = kind.__struct_fields__
    return operator.attrgetter(*names) if len(names) > 1 else lambda each: tuple(getattr(each, name) for name in names)


@functools.cache
def _slots(kind: type) -> tuple[Any, ...]:
    """Return the descriptors of the attributes that objects of this class keep outside `__dict__`."""
    members: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        if "__slots__" in vars(base) and not issubclass(base, (msgspec.Struct, functools.partial)):
            members |= vars(base)
    return tuple(each for each in members.values() if isinstance(each, types.MemberDescriptorType))


def _read(slot: Any, each: Any) -> Any:
    try:
        return slot.__get__(each)
    except (AttributeError, ValueError):
        return UNSET


def _is_same(mapping: dict[Any, Any], items: dict[Any, Any]) -> bool:
    return not (mapping or items) or (
        len(mapping) == len(items)
        and all(map(operator.is_, mapping, items))
        and all(map(operator.is_, mapping.values(), items.values()))
    )
