"""Wraps the contributions of plugins: every callable in them gets a guard."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from corral.auth.principal import Authenticator
from corral.events.consumers import Subscriber
from corral.http.signature import hints
from corral.plugin import Gate, HealthCheck, Meter
from corral.plugins.guard import Guard, Terms, guarded
from corral.plugins.quarantine import PluginQuarantine
from corral.plugins.record import PluginRecord
from corral.plugins.return_types import ANYTHING, Expected, of_field, of_method

HEALTH_SECONDS = 2.0
ROUTES, OF_ROUTES = "corral_routes", ("quarantined", "disabled")  # disabled: for requests that were admitted before
UNAWAITED = Expected(None, False)


class Guarded:
    """A proxy for a contributed object. Its public methods are guarded; all other attributes are unchanged."""

    def __init__(self, item: Any, guards: Mapping[str, Callable[..., Any]]) -> None:
        self.__dict__.update(guards, _item=item)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_item"], name)

    @property  # type: ignore[misc]  # read only
    def __class__(self) -> Any:  # isinstance() sees the class of the contributed object
        return type(self.__dict__["_item"])

    def __repr__(self) -> str:
        return repr(self.__dict__["_item"])


class Guards:
    """Creates the guards of a kernel. `all` contains every guard that was created."""

    def __init__(self, warden: PluginQuarantine) -> None:
        self._warden = warden
        self.all: list[Guard] = []

    def put(self, loaded: PluginRecord, where: str, function: Callable[..., Any], terms: Terms) -> Guard:
        """Create and register a guard around a callable."""
        if isinstance(function, Guard):  # the same object, contributed to an earlier kernel of this process
            function = function.function
        guard = Guard(self._warden, loaded, where, function, terms)
        self.all.append(guard)
        return guard

    def function(
        self, loaded: PluginRecord, where: str, function: Callable[..., Any], terms: Terms
    ) -> Callable[..., Any]:
        """Create a guard and return it as a callable: as a coroutine function if `function` is one."""
        return guarded(self.put(loaded, where, function, terms))

    def job(self, loaded: PluginRecord, hook: str, name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        """Return the guarded function of a job or schedule. It has no budget: jobs have their own time limit."""
        expected = ANYTHING if inspect.iscoroutinefunction(run) else UNAWAITED
        return self.function(loaded, name, run, Terms(hook=hook, budget=None, expected=expected))

    def route(self, loaded: PluginRecord, label: str, handler: Callable[..., Any]) -> Callable[..., Any]:
        """Return the handler of a route or socket, guarded if the plugin is a third-party plugin."""
        if loaded.found.built_in:
            return handler
        return self.function(loaded, label, handler, Terms(hook=ROUTES, budget=None, counts=False, also=OF_ROUTES))

    def subscriber(self, loaded: PluginRecord, subscriber: Subscriber, handle: Callable[..., Any]) -> Guard:
        """Return the guarded function of a durable consumer."""
        return self.put(loaded, subscriber.name, handle, Terms(hook="corral_subscribers", expected=UNAWAITED))

    def health_check(self, loaded: PluginRecord, item: HealthCheck) -> HealthCheck:
        """Return the health check with a guarded function. A check that fails reports the status down."""
        terms = Terms(
            hook="corral_health_checks",
            expected=Expected((tuple,), False),
            budget=HEALTH_SECONDS,
            otherwise=("down", f"The check of the plugin {loaded.name} failed."),
        )
        return msgspec.structs.replace(item, check=self.put(loaded, f"health check {item.name}", item.check, terms))

    def enclose(self, loaded: PluginRecord, hooks: Mapping[str, tuple[str, Any]]) -> None:
        """Guard all contributions of a plugin. `hooks` maps the hooks of plugins to their owner and protocol."""
        given, bound = loaded.contributed, loaded.bound
        bound.jobs = [(job, self.job(loaded, "corral_jobs", job.name, run)) for job, run in bound.jobs]
        bound.schedules = [
            (item, self.job(loaded, "corral_schedules", item.name, run)) for item, run in bound.schedules
        ]
        bound.subscribers = [(item, self.subscriber(loaded, item, run)) for item, run in bound.subscribers]
        given.health_checks = [self.health_check(loaded, item) for item in given.health_checks]
        closed = loaded.protected
        given.gates = [
            self.item(
                loaded,
                "corral_gates",
                gate,
                Meter if isinstance(gate, Meter) else Gate,
                otherwise=None,
                closed=closed,
                watched=not closed,  # gates of protected plugins are called by every request
            )
            for gate in given.gates
        ]
        # Routes of a quarantined built-in plugin stay available, so the authentication of their callers must too.
        also = ("quarantined",) if loaded.found.built_in else ()
        bound.authenticators = [
            self.item(loaded, "corral_authenticators", item, Authenticator, otherwise=None, closed=closed, also=also)
            for item in bound.authenticators
        ]
        given.metrics = [self.item(loaded, "corral_metrics", item) for item in given.metrics]
        for hook, (owner, protocol) in hooks.items():
            if owner != loaded.name and hook in given.to_plugins:  # a plugin's own hook is not guarded
                given.put(hook, [self.item(loaded, hook, item, protocol, budget=None) for item in given.of(hook)])

    def item(self, loaded: PluginRecord, hook: str, item: Any, protocol: Any = None, **terms: Any) -> Any:
        """Return any contributed object with guards around its callables.

        `protocol` is the type that the hook declares for contributions; it states what the methods return.
        """
        if isinstance(item, (type, str, bytes, int, float, tuple, list, dict)) or inspect.ismodule(item):
            return item
        name = str(getattr(item, "name", "") or getattr(item, "kind", "") or type(item).__name__)
        if isinstance(item, msgspec.Struct):
            return self._struct(loaded, hook, name, item, terms)
        if inspect.isroutine(item) or isinstance(item, functools.partial):
            return self.function(loaded, f"{hook} {name}", item, Terms(hook=hook, **terms))
        methods = {
            each: self.function(
                loaded,
                f"{hook} {name}.{each}",
                getattr(item, each),
                Terms(hook=hook, expected=of_method(protocol, each), **terms),
            )
            for each, _ in inspect.getmembers(type(item), inspect.isroutine)
            if not each.startswith("_")
        }
        return Guarded(item, methods)

    def _struct(
        self, loaded: PluginRecord, hook: str, name: str, item: msgspec.Struct, terms: Mapping[str, Any]
    ) -> Any:
        """Guard the callables in the fields of a shape. The annotations of the fields state what they return."""
        found: dict[str, Any] = {}
        for field, annotated in hints(type(item)).items():
            value, expected = getattr(item, field, None), of_field(annotated)
            if expected is not None and callable(value):
                told = Terms(hook=hook, expected=expected, **terms)
                found[field] = self.function(loaded, f"{hook} {name}.{field}", value, told)
        return msgspec.structs.replace(item, **found) if found else item
