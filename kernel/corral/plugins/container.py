"""The dependency injection container, which maps types to services and decides which plugin may use which service.

A plugin may use the services of the kernel, its own services, and the services of plugins in its `requires`. With the
annotation `X | None`, it may also use the services of plugins in its `wants`, and every kernel protocol that a plugin
implements. A plugin's configuration is injected like a service; no other plugin may use it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, TypeVar

from corral.http.handler_signature import optional_hints
from corral.plugin import Provide
from corral.plugins.record import PluginRecord

T = TypeVar("T")

KERNEL = "corral"  # plugins may use protocols of this package without naming the plugin that provides them


class WiringError(Exception):
    """Raised when a plugin needs a service that does not exist or that its manifest does not allow it to use."""


class Container:
    """Contains one service instance per type, and the plugin that owns each instance.

    If the owner is None, the service belongs to the kernel.
    """

    def __init__(self) -> None:
        self._services: dict[Any, tuple[Any, PluginRecord | None]] = {}
        self.sections: set[Any] = set()
        """The types of the configuration sections of all plugins."""

    def add(self, kind: Any, instance: Any, owner: PluginRecord | None = None) -> None:
        """Register a service instance. Raise `WiringError` if another owner already provides the type."""
        _, present = self._services.get(kind, (None, owner))
        if owner is not present:
            names = [each.name if each is not None else "the kernel" for each in (owner, present)]
            raise WiringError(f"{names[0]} provides {_name(kind)}, but {names[1]} already provides it")
        self._services[kind] = instance, owner

    def get(self, kind: Callable[..., T]) -> T:  # not type[T], which mypy refuses for protocols
        """Return the service of the given type without access checks.

        The kernel, commands and tests use this method.
        """
        if kind not in self._services:
            raise WiringError(f"no plugin provides {_name(kind)}")
        service: T = self._services[kind][0]
        return service

    def get_optional(self, kind: Callable[..., T]) -> T | None:
        """Return the service of the given type, or None if it is absent or out of service. Access is not checked."""
        service, owner = self._services.get(kind, (None, None))
        return service if owner is None or owner.in_service else None

    def drop(self, owner: PluginRecord) -> None:
        """Remove all services of a plugin that failed."""
        self._services = {kind: service for kind, service in self._services.items() if service[1] is not owner}

    def build(self, record: PluginRecord, provides: Iterable[Provide]) -> list[Any]:
        """Create the services of a plugin in dependency order, and return the instances.

        Raise `WiringError` if the dependencies of services form a cycle.
        """
        waiting = [(item, tuple(kind for kind, _ in _parameters(item.factory).values())) for item in provides]
        made: list[Any] = []
        while waiting:
            own = {item.kind for item, _ in waiting}
            ready = [item for item, needed in waiting if own.isdisjoint(needed)]
            if not ready:
                raise WiringError(f"the services {sorted(_name(item.kind) for item, _ in waiting)} form a cycle")
            for item in ready:
                instance = self.call(item.factory, record)
                self.add(item.kind, instance, record)
                made.append(instance)
            waiting = [each for each in waiting if each[0] not in ready]
        return made

    def call(self, factory: Callable[..., T], record: PluginRecord) -> T:
        """Call a class or factory function with the services that its parameters request, and return the result."""
        return factory(**self.resolve_services(_parameters(factory), record, _name(factory)))

    def inject(self, instance: Any, record: PluginRecord) -> None:
        """Set the instance's attributes annotated `X | None` to the services of plugins in `wants`, or to None."""
        for name, (kind, optional) in optional_hints(cls := type(instance)).items():
            if optional and self._is_injectable(kind):
                setattr(instance, name, self.find(kind, record, optional=True, where=f"{cls.__name__}.{name}"))

    def bind(
        self, function: Callable[..., Any], record: PluginRecord, *, skip: Collection[str] = ()
    ) -> Callable[..., Any]:
        """Return `function` with its services bound.

        Parameters that are listed in `skip`, or whose types are not services, stay unbound.
        """
        parameters = _parameters(function).items()
        wanted = {name: each for name, each in parameters if name not in skip and self._is_injectable(each[0])}
        arguments = self.resolve_services(wanted, record, _name(function))
        return functools.partial(function, **arguments) if arguments else function

    def resolve_services(
        self, wanted: Mapping[str, tuple[Any, bool]], record: PluginRecord, where: str
    ) -> dict[str, Any]:
        """Return the services that a signature requests, keyed by parameter name."""
        return {
            name: self.find(kind, record, optional=optional, where=f"{where}, parameter {name}")
            for name, (kind, optional) in wanted.items()
        }

    def find(self, kind: Any, record: PluginRecord, *, optional: bool, where: str) -> Any:
        """Return the service for `kind`, or None if the service is optional and absent.

        Raise `WiringError` if the service is missing or the plugin may not use it.
        """
        if kind in self.sections:
            if record.plugin is None or kind is not record.plugin.config:
                raise WiringError(f"{record.name}: {where}: {_name(kind)} is the configuration of another plugin")
            return record.plugin.section
        if kind not in self._services:
            if optional:
                return None
            raise WiringError(f"{record.name}: {where}: no plugin provides {_name(kind)}")
        service, owner = self._services[kind]
        if owner is None or owner is record or owner.name in record.requires:
            return service
        if owner.name not in record.wants and getattr(kind, "__module__", "").partition(".")[0] != KERNEL:
            raise WiringError(f"{record.name}: {where}: to use {_name(kind)}, add {owner.name} to requires or wants")
        if not optional:
            raise WiringError(f"{record.name}: {where}: the plugin {owner.name} is optional; use {_name(kind)} | None")
        return self.get_optional(kind)

    def _is_injectable(self, kind: Any) -> bool:
        return kind in self._services or kind in self.sections or getattr(kind, "_is_protocol", False)


def _parameters(function: Any) -> dict[str, tuple[Any, bool]]:
    """Return the type of each parameter of a function or class, and whether the parameter is optional (`X | None`)."""
    return optional_hints(function.__init__ if inspect.isclass(function) else function)


def _name(kind: Any) -> str:
    return getattr(kind, "__name__", str(kind))
