"""Guards: wrappers around contributed callables that measure them, limit their time and contain their errors.

Declared failures are passed to the caller. All other errors are counted against the plugin. Then a guard either returns
a default value (`otherwise`), so that a hook continues without the contribution, or raises the error to the caller,
as `ContributionFailed` if it is not an `Exception`.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from typing import Any

import msgspec

from corral import current_call
from corral.current_call import CallLost, Inside, leave, running
from corral.database.engine import translate
from corral.database.pool import UnitLost
from corral.errors import ContributionFailed, Failure, Unavailable
from corral.plugins.quarantine import PluginQuarantine
from corral.plugins.record import PluginRecord
from corral.plugins.return_types import ANYTHING, Expected

PASSES = (asyncio.CancelledError, KeyboardInterrupt, GeneratorExit, UnitLost)
TELLS: Any = object()
"""A value of `Terms.otherwise`: raise the error to the caller instead of returning a default value."""

_thread = threading.get_ident
_now = time.perf_counter


class Terms(msgspec.Struct, frozen=True, kw_only=True):
    """The options of a guard.

    `budget` is the time limit in seconds of a call outside the event loop: 0 means the value of the setting, None means
    that the caller limits the time. `otherwise` is the value to return if a call fails, or `TELLS` to raise the error.
    `closed` makes a failed call raise `Unavailable` instead of continuing without the result. `counts` makes errors
    count towards quarantine. `also` lists states of the plugin, in addition to active, in which calls are allowed.
    `watched` is False for built-in callables that run on every request: only their errors are handled, without
    measurement or time limit.
    """

    hook: str
    expected: Expected = ANYTHING
    budget: float | None = 0.0
    otherwise: Any = TELLS
    closed: bool = False
    counts: bool = True
    also: tuple[str, ...] = ()
    watched: bool = True


class Guard:
    """A guarded callable. `calls` and `seconds` are the number and total duration of its calls since the start."""

    def __init__(
        self, warden: PluginQuarantine, loaded: PluginRecord, where: str, function: Callable[..., Any], terms: Terms
    ) -> None:
        self.warden, self.loaded, self.where, self.terms = warden, loaded, where, terms
        self.function = function
        self.calls, self.seconds = 0, 0.0
        self._quick, self.blamed = terms.expected.plain, terms.counts
        self.plugin = loaded.name
        functools.update_wrapper(self, function, updated=())

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        if self.loaded.state != "active" and self.loaded.state not in self.terms.also:
            return self._absent()
        thread = _thread()
        outer = running.get(thread)
        running[thread] = entry = Inside(self)
        began = _now()
        try:
            value = self.function(*arguments, **named)
        except BaseException as error:
            leave(thread, entry, outer)
            return self._failed(error)
        finally:
            self.calls += 1
            self.seconds += _now() - began
        if leave(thread, entry, outer):
            return self._failed(CallLost())
        return value if isinstance(value, self._quick) else self.judged(value)

    def unwatched(self, *arguments: Any, **named: Any) -> Any:
        """Call the function and handle only its errors: no measurement, no time limit and no check of the result."""
        try:
            return self.function(*arguments, **named)
        except BaseException as error:
            return self._failed(error)

    def tentatively(self, *arguments: Any, **named: Any) -> Any:
        """Call the function without counting an error, because the caller tries again in another way.

        Exceptions are raised unchanged, except `SystemExit` and `CallLost`, which become `ContributionFailed`.
        """
        thread = _thread()
        outer = running.get(thread)
        running[thread] = entry = Inside(self)
        try:
            value = self.function(*arguments, **named)
        except SystemExit as error:
            raise ContributionFailed(self.where) from error
        except CallLost:
            raise ContributionFailed(self.where) from None
        finally:
            leave(thread, entry, outer)
        return self.judged(value)

    def judged(self, value: Any) -> Any:
        """Return the value if it has the expected type; otherwise handle the mismatch as an error of the plugin.

        Awaitables and asynchronous iterators are returned with a guard around each of their steps.
        """
        expected = self.terms.expected
        if hasattr(value, "__anext__"):
            return Relayed(self, value)
        if inspect.isawaitable(value):
            if expected.awaited is False:
                if inspect.iscoroutine(value):
                    value.close()
                return self._failed(TypeError("it is a coroutine function where a plain one is called"))
            return self.awaited(value)
        if expected.awaited:
            return self._failed(TypeError(f"it returned {type(value).__name__}, which cannot be awaited"))
        return value if expected.fits(value) else self._misfit(value)

    async def awaited(self, working: Awaitable[Any]) -> Any:
        """Await `working` with a guard and return its result. The state of the plugin is not checked."""
        token = current_call.room.set(self.plugin)
        try:
            value = await Steps(self, working)
        except BaseException as error:
            return self._failed(error)
        finally:
            current_call.room.reset(token)
        return value if self.terms.expected.fits(value) else self._misfit(value)

    async def in_steps(self, *arguments: Any, **named: Any) -> Any:
        """Call a coroutine function and await it with a guard around each step."""
        if self.loaded.state != "active" and self.loaded.state not in self.terms.also:
            return self._absent()
        began = _now()
        try:
            working = self.function(*arguments, **named)
        except BaseException as error:
            return self._failed(error)
        try:
            return await self.awaited(working)
        finally:
            self.calls += 1
            self.seconds += _now() - began

    def _misfit(self, value: Any) -> Any:
        return self._failed(TypeError(f"it returned {type(value).__name__}, not {self.terms.expected.names()}"))

    def _absent(self) -> Any:
        if self.terms.otherwise is TELLS:
            raise ContributionFailed(f"{self.where}: {self.loaded.name} is {self.loaded.state}")
        return self.terms.otherwise

    def _failed(self, error: BaseException) -> Any:
        if isinstance(error, PASSES) or is_declared(error):
            raise error
        if not isinstance(error, CallLost) and self.terms.counts:
            error._corral_plugin = self.loaded.name  # type: ignore[attr-defined]  # so that no other plugin is blamed
            self.warden.strike(self.loaded, self.where, error)
        if self.terms.closed:
            told = f"{self.loaded.name} could not check this; its errors are at /plugins/{self.loaded.name}/errors."
            raise Unavailable(told, code="plugin_failed") from error
        if self.terms.otherwise is not TELLS:
            return self.terms.otherwise
        if isinstance(error, Exception):
            raise error
        raise ContributionFailed(f"{self.where}: {type(error).__name__}") from error

    def stuck(self, thread: int) -> None:
        self.warden.tracker(self.loaded.name).stuck.add(thread)

    def lost(self, thread: int) -> None:
        self.warden.lost(self.loaded, self.where, thread, counts=self.terms.counts)

    def returned(self, thread: int) -> None:
        self.warden.returned(self.loaded, thread)


class Steps:
    """Awaits an awaitable on behalf of a guard. A step that blocks the event loop for too long is abandoned."""

    def __init__(self, guard: Guard, working: Awaitable[Any]) -> None:
        self._guard, self._working = guard, working

    def __await__(self) -> Generator[Any, Any, Any]:
        steps: Any = self._working.__await__()
        throwing: BaseException | None = None
        while True:
            thread = _thread()
            outer = running.get(thread)
            running[thread] = entry = Inside(self._guard)
            try:
                waited = steps.send(None) if throwing is None else steps.throw(throwing)
            except StopIteration as ended:
                return ended.value
            finally:
                leave(thread, entry, outer)
            throwing = None
            try:
                yield waited
            except BaseException as error:
                throwing = error


class Relayed:
    """An asynchronous iterator that a contribution returned. Each step is guarded."""

    def __init__(self, guard: Guard, iterator: AsyncIterator[Any]) -> None:
        self._guard, self._iterator = guard, iterator

    def __aiter__(self) -> Relayed:
        return self

    async def __anext__(self) -> Any:
        try:
            return await Steps(self._guard, self._iterator.__anext__())
        except StopAsyncIteration:
            raise
        except BaseException as error:
            return self._guard._failed(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._iterator, name)


def guarded(guard: Guard) -> Callable[..., Any]:
    """Return the guard as a callable. If it guards a coroutine function, return a coroutine function."""
    if not inspect.iscoroutinefunction(guard.function) or guard.terms.expected.awaited is False:
        if not guard.terms.watched:
            return guard.unwatched
        return guard  # it rejects a coroutine function where a plain function is expected

    @functools.wraps(guard.function)
    async def run(*arguments: Any, **named: Any) -> Any:
        return await guard.in_steps(*arguments, **named)

    return run


def is_declared(error: BaseException) -> bool:
    """Return whether an error is a declared failure, a database failure, or was already counted against a plugin."""
    if isinstance(error, Failure) or hasattr(error, "_corral_plugin"):
        return True
    return isinstance(translate(error), Failure)
