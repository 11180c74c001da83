"""Types to services. A plugin may be given what its `requires` and `wants` name, and what the kernel offers to all."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import msgspec

from corral.http.signature import hints, without_none
from corral.plugin import Provide

T = TypeVar("T")

EVERYBODYS = ("corral.plugin", "corral.settings.store", "corral_core.accounts.api")  # protocols that a plugin provides
CORE = "core"  # the kernel's own plugin: its services are everybody's, like the kernel's


class Scope(msgspec.Struct, frozen=True):
    """Who asks: a plugin's name and the plugins whose services it may get."""

    plugin: str
    requires: frozenset[str]
    wants: frozenset[str]


class Wiring(Exception):
    """A service is asked for that nobody provides, or that the manifest does not name."""


class Container:
    """One instance a type. `owner` "" is the kernel."""

    def __init__(self) -> None:
        self._instances: dict[Any, Any] = {}
        self._owners: dict[Any, str] = {}
        self._closed: set[str] = set()

    def add(self, kind: Any, instance: Any, owner: str = "") -> None:
        """Register a made service."""
        if kind in self._owners and self._owners[kind] != owner:
            raise Wiring(f"{owner} provides {_name(kind)}, which {self._owners[kind] or 'the kernel'} provides already")
        self._instances[kind] = instance
        self._owners[kind] = owner

    def get(self, kind: type[T]) -> T:
        """A service by type, for the composition root and tests."""
        try:
            service: T = self._instances[kind]
        except KeyError:
            raise Wiring(f"nobody provides {_name(kind)}") from None
        return service

    def drop(self, owner: str) -> None:
        """Forget the services of a plugin that failed."""
        for kind in [kind for kind, name in self._owners.items() if name == owner]:
            del self._instances[kind], self._owners[kind]

    def close(self, owner: str, *, closed: bool) -> None:
        """Have `X | None` of this owner answer None from the next injection on, or open it again."""
        (self._closed.add if closed else self._closed.discard)(owner)

    def build(self, room: Scope, provides: Iterable[Provide]) -> list[Any]:
        """Make the services of a plugin in whatever order their constructors allow; returns the instances."""
        waiting = list(provides)
        made: list[Any] = []
        while waiting:
            own = {item.kind for item in waiting}
            ready = [item for item in waiting if not own & self._needs(item)]
            if not ready:
                raise Wiring(f"the services {sorted(_name(item.kind) for item in waiting)} need each other")
            for item in ready:
                instance = self.call(item.factory, room)
                self.add(item.kind, instance, room.plugin)
                made.append(instance)
                waiting.remove(item)
        return made

    def call(self, factory: Callable[..., T], room: Scope) -> T:
        """Make an object; its constructor's parameters are services."""
        function: Any = factory.__init__ if inspect.isclass(factory) else factory
        arguments = self._arguments(function, room, skip=("self", "return"))
        return factory(**arguments)

    def inject(self, instance: Any, room: Scope) -> None:
        """Fill the class attributes annotated `X | None` with services of `wants`."""
        for name, kind in hints(type(instance)).items():
            kind, optional = without_none(kind)
            if optional and (kind in self._owners or getattr(kind, "_is_protocol", False)):
                setattr(instance, name, self.find(kind, room, optional=True, where=f"{type(instance).__name__}.{name}"))

    def bind(self, function: Callable[..., Any], room: Scope, *, skip: Iterable[str] = ()) -> Callable[..., Any]:
        """`function` with its services filled in; parameters in `skip` and those with plain types stay open."""
        arguments = self._arguments(function, room, skip={*skip, "return"}, partial=True)
        return functools.partial(function, **arguments) if arguments else function

    def services(self, wanted: Mapping[str, tuple[Any, bool]], room: Scope, where: str) -> dict[str, Any]:
        """The services of a read signature."""
        return {
            name: self.find(kind, room, optional=optional, where=f"{where}, parameter {name}")
            for name, (kind, optional) in wanted.items()
        }

    def find(self, kind: Any, room: Scope, *, optional: bool, where: str) -> Any:
        """The service for `kind`, as this room may have it; None when optional and absent."""
        if (owner := self._owners.get(kind)) is None:
            if optional:
                return None
            raise Wiring(f"{room.plugin}: {where}: nobody provides {_name(kind)}")
        if owner in ("", CORE, room.plugin) or owner in room.requires:
            return self._instances[kind]
        if owner not in room.wants and getattr(kind, "__module__", "") not in EVERYBODYS:
            raise Wiring(f"{room.plugin}: {where}: {_name(kind)} is of {owner}: name it in requires or wants")
        if not optional:
            raise Wiring(f"{room.plugin}: {where}: {owner} is only wanted: take {_name(kind)} | None")
        return None if owner in self._closed else self._instances[kind]

    def _needs(self, item: Provide) -> set[Any]:
        function: Any = item.factory.__init__ if inspect.isclass(item.factory) else item.factory
        return {without_none(kind)[0] for name, kind in hints(function).items() if name != "return"}

    def _arguments(self, function: Any, room: Scope, *, skip: Iterable[str], partial: bool = False) -> dict[str, Any]:
        if function is object.__init__:
            return {}
        arguments: dict[str, Any] = {}
        where = getattr(function, "__qualname__", repr(function))
        for name, annotated in hints(function).items():
            if name in skip:
                continue
            kind, optional = without_none(annotated)
            if partial and kind not in self._owners and not getattr(kind, "_is_protocol", False):
                continue
            arguments[name] = self.find(kind, room, optional=optional, where=f"{where}, parameter {name}")
        return arguments


def _name(kind: Any) -> str:
    return getattr(kind, "__name__", str(kind))
