"""Guards: wrappers around all callables that plugins contribute. They measure calls and handle errors.

Expected failures (`corral.errors.ExpectedFailure`) propagate to the caller. All other errors are counted against the
plugin. After such an error, a guard either returns a default value, so that the caller continues without the plugin's
result, or raises the error. An error that is not an `Exception` is raised as `ContributionFailed`. The watchdog limits
the duration of calls.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import msgspec

from corral.auth.principal import Authenticator
from corral.background_tasks import is_cancelled
from corral.database.engine import translate_error
from corral.errors import ContributionFailed, ExpectedFailure, Unavailable
from corral.plugin import Gate, RateLimiter
from corral.plugins.quarantine import ABANDONED, ENDLESS, LostCall, PluginQuarantine
from corral.plugins.record import PluginRecord, State
from corral.plugins.return_types import ANYTHING, NOT_AWAITED, ExpectedReturn, expected_returns
from corral.plugins.thread_pool import acting_plugin
from corral.watchdog import CallAbandoned, ThreadAbandoned, guard_code

RAISE: Any = object()
"""A value for `Guard.default`. If a call fails, the guard re-raises the error."""
REFUSE: Any = object()
"""A value for `Guard.default`. If a call fails, the guard raises `Unavailable`."""
WORK = (("corral_jobs", "run", None), ("corral_schedules", "run", None), ("corral_subscribers", "handle", 0.0))
"""The hooks for background work, each with the value of `Guard.limit`, and the field that contains the function."""
HEALTH_SECONDS = 2.0
LOOP_SECONDS = 1.0  # third-party plugins get less time on the event loop, which all share

_now = time.perf_counter


class Guard:
    """A plugin's callable with a time limit, whose failures are counted.

    `calls` is the number of calls, and `seconds` is their total duration.

    `expected` states what kind of value a call must return. If a call fails, the guard returns `default`, or raises an
    error if `default` is `RAISE` or `REFUSE`. `limit` is the time limit, in seconds, for a call in a thread. If it is
    0, the time limit that the settings define for all plugins applies; if it is None, the caller limits the time.
    `counts` is true if failures count towards quarantine. Calls are allowed while the state of the plugin is one of
    `states`.
    """

    def __init__(
        self,
        guards: Guards,
        record: PluginRecord,
        hook: str,
        where: str,
        function: Callable[..., Any],
        *,
        expected: ExpectedReturn = ANYTHING,
        default: Any = RAISE,
        limit: float | None = 0.0,
        counts: bool = True,
        states: tuple[State, ...] = ("active",),
    ) -> None:
        self.quarantine, self.record, self.plugin = guards.quarantine, record, record.name
        self.hook, self.where, self.function = hook, where, function
        self.expected, self.default, self.limit, self.counts, self.states = expected, default, limit, counts, states
        self._accepted = expected.accepted_classes
        self.calls, self.seconds = 0, 0.0
        guards.all.append(self)

    @property
    def guarded(self) -> Callable[..., Any]:
        """The guarded function: a coroutine function if `function` is one and `expected` allows an awaitable."""
        is_async = inspect.iscoroutinefunction(self.function) and self.expected.awaited is not False
        return self.call_async if is_async else self

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        if self.record.state not in self.states:
            return self._out_of_service()
        began = _now()
        try:
            value = self.function(*arguments, **named)
        except BaseException as error:
            return self._on_error(error)
        finally:
            self.calls += 1
            self.seconds += _now() - began
        return value if isinstance(value, self._accepted) else self._checked(value)

    async def call_async(self, *arguments: Any, **named: Any) -> Any:
        """Call the guarded coroutine function."""
        if self.record.state not in self.states:
            return self._out_of_service()
        began = _now()
        try:
            return await self.await_result(self.function(*arguments, **named))
        finally:
            self.calls += 1
            self.seconds += _now() - began

    def call_uncounted(self, *arguments: Any, **named: Any) -> Any:
        """Call the function without counting its errors. Use this method if a failed call is retried in another way."""
        began = _now()
        try:
            return self._checked(self.function(*arguments, **named))
        finally:
            self.calls += 1
            self.seconds += _now() - began

    async def await_result(self, result: Awaitable[Any]) -> Any:
        """Await the awaitable that the function returned. This method does not check the state of the plugin."""
        began = _now()  # noqa: F841  (read by the watchdog)
        token = acting_plugin.set(self.plugin)
        try:
            value = await result
        except BaseException as error:
            return self._on_error(error)
        finally:
            acting_plugin.reset(token)
        return value if self.expected.fits(value) else self._reject_type(value)

    async def _iterate(self, iterator: AsyncIterator[Any]) -> AsyncIterator[Any]:
        began = _now()  # noqa: F841  (read by the watchdog)
        try:
            async for item in iterator:
                yield item
        except BaseException as error:
            self._on_error(error)
        finally:
            if (close := getattr(iterator, "aclose", None)) is not None:
                await close()

    def _checked(self, value: Any) -> Any:
        """Return the value if it has the expected type. Otherwise, treat the mismatch as a plugin error."""
        if hasattr(value, "__anext__"):
            return self._iterate(value)
        if inspect.isawaitable(value):
            if self.expected.awaited is not False:
                return self.await_result(value)
            if inspect.iscoroutine(value):
                value.close()
            return self._on_error(TypeError("the callable is a coroutine function, but must be a plain function"))
        if self.expected.awaited:
            return self._on_error(TypeError(f"the call returned {type(value).__name__}, which cannot be awaited"))
        return value if self.expected.fits(value) else self._reject_type(value)

    def _reject_type(self, value: Any) -> Any:
        return self._on_error(TypeError(f"the call returned {type(value).__name__}, not {self.expected.class_names()}"))

    def _out_of_service(self) -> Any:
        if self.default is RAISE or self.default is REFUSE:
            raise ContributionFailed(f"{self.where}: {self.plugin} is {self.record.state}")
        return self.default

    def _on_error(self, error: BaseException) -> Any:
        if _is_interruption(error) or is_expected_error(error):
            raise error
        if self.counts and not isinstance(error, CallAbandoned):
            error._corral_plugin = self.plugin  # type: ignore[attr-defined]  # so that no other plugin is blamed
            self.quarantine.count_error(self.record, self.where, error)
        if self.default is REFUSE:
            detail = f"A check of the plugin {self.plugin} failed; its errors are at /plugins/{self.plugin}/errors."
            raise Unavailable(detail, code="plugin_failed") from error
        if self.default is not RAISE:
            return self.default
        if isinstance(error, Exception):
            raise error
        raise ContributionFailed(f"{self.where}: {type(error).__name__}") from error

    def time_limit(self, *, on_loop: bool) -> float | None:
        if on_loop:
            return self.quarantine.time_limit if self.record.found.built_in else LOOP_SECONDS
        return self.quarantine.time_limit if self.limit == 0 else self.limit

    def count_lost_call(self, *, endless: bool = False) -> None:
        # The thread of a route counts only when it is endless: a route that ends when it is interrupted harms nobody.
        counts = not self.counts if endless else self.counts
        self.quarantine.count_error(self.record, self.where, LostCall(ENDLESS if endless else ABANDONED), counts=counts)


guard_code.update(
    method.__code__ for method in (Guard.__call__, Guard.call_uncounted, Guard.await_result, Guard._iterate)
)


def is_expected_error(error: BaseException) -> bool:
    """Return whether the error must not be counted against a plugin.

    Expected failures (`corral.errors.ExpectedFailure`), database failures, and errors that have already been counted
    against a plugin must not be counted.
    """
    return hasattr(error, "_corral_plugin") or isinstance(translate_error(error), ExpectedFailure)


def _is_interruption(error: BaseException) -> bool:
    """Return whether the plugin's call was interrupted from outside, so that the error is not the plugin's own."""
    if isinstance(error, asyncio.CancelledError):
        return is_cancelled()
    if isinstance(error, KeyboardInterrupt):  # a server has a handler of its own, so there the plugin raised it
        return signal.getsignal(signal.SIGINT) is signal.default_int_handler
    return isinstance(error, (GeneratorExit, ThreadAbandoned))


class GuardedObject:
    """A proxy for a contributed object. The public methods are guarded; all other attributes are passed through."""

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

    def __init__(self, quarantine: PluginQuarantine) -> None:
        self.quarantine = quarantine
        self.all: list[Guard] = []

    def wrap_route(self, record: PluginRecord, label: str, handler: Callable[..., Any]) -> Callable[..., Any]:
        """Return the handler of a route or WebSocket, wrapped in a guard if a third-party plugin contributed it."""
        if record.found.built_in:
            return handler
        states: tuple[State, ...] = ("active", "quarantined", "disabled")  # the last for requests admitted before
        return Guard(self, record, "corral_routes", label, handler, limit=None, counts=False, states=states).guarded

    def wrap_contributions(self, record: PluginRecord, hooks: Mapping[str, tuple[str, Any]]) -> None:
        """Guard all contributions of a plugin.

        `hooks` describes the hooks that plugins offer. It maps the name of each hook to the plugin that offers the
        hook, and to the type of its contributions.
        """

        def wrap(hook: str, **options: Any) -> None:
            items = record.contributions_to(hook)
            items[:] = [self.wrap_item(record, hook, item, **options) for item in items]

        for hook, field, limit in WORK:
            items = record.contributions_to(hook)
            items[:] = [self._wrap_work(record, hook, item, field, limit) for item in items]
        down = ("down", f"The check of the plugin {record.name} failed.")
        wrap("corral_health_checks", default=down, limit=HEALTH_SECONDS)
        wrap("corral_metrics")
        default = REFUSE if record.protected else None
        wrap("corral_gates", protocol=Gate | RateLimiter, default=default)
        # Routes of a quarantined built-in plugin stay available, so the authentication of their callers must too.
        states = ("active", "quarantined") if record.found.built_in else ("active",)
        record.authenticators = [
            self.wrap_item(record, "corral_authenticators", item, Authenticator, default=default, states=states)
            for item in record.authenticators
        ]
        for hook, (owner, protocol) in hooks.items():
            if owner != record.name:  # a plugin's own hook is not guarded
                wrap(hook, protocol=protocol, limit=None)

    def _wrap_work(self, record: PluginRecord, hook: str, item: Any, field: str, limit: float | None) -> Any:
        """Return a job, schedule or subscriber whose function is wrapped in a guard with this time limit."""
        function = getattr(item, field)
        expected = ANYTHING if inspect.iscoroutinefunction(function) else NOT_AWAITED
        guard = Guard(self, record, hook, item.name, function, limit=limit, expected=expected)
        return msgspec.structs.replace(item, **{field: guard.guarded})

    def wrap_item(self, record: PluginRecord, hook: str, item: Any, protocol: Any = None, **options: Any) -> Any:
        """Return a contributed object with guards around its callables.

        `protocol` is the type that the hook declares for contributions. The annotations of its methods define the
        expected return types. If the object is a msgspec struct, the annotations of its fields define them instead.
        """
        if isinstance(item, (type, str, bytes, int, float, tuple, list, dict)) or inspect.ismodule(item):
            return item
        name = str(getattr(item, "name", "") or getattr(item, "kind", "") or type(item).__name__)
        if inspect.isroutine(item) or isinstance(item, functools.partial):
            return Guard(self, record, hook, f"{hook} {name}", item, **options).guarded
        cls: Any = type(item)
        guarded = {
            each: Guard(self, record, hook, f"{hook} {name}.{each}", function, expected=returned, **options).guarded
            for each, returned in expected_returns(cls, protocol).items()
            if callable(function := getattr(item, each, None))
        }
        if isinstance(item, msgspec.Struct):
            return msgspec.structs.replace(item, **guarded) if guarded else item
        return GuardedObject(item, guarded)
