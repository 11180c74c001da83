"""A contributed callable with its guard around it: counted, limited in time, and unable to harm who calls it.

Declared failures pass; whatever else comes out of it is counted against its plugin. Then hooks of which everybody is
called go on without it (`otherwise`), and where the caller must know it is told by `ContributionFailed`.
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
"""As `otherwise`: the caller is told of the failure."""

_thread = threading.get_ident
_now = time.perf_counter


class Terms(msgspec.Struct, frozen=True, kw_only=True):
    """How a callable is guarded.

    `budget`: seconds of a call beside the event loop; None: its caller has a limit; 0: the setting's. `otherwise`: what
    is returned instead of a failed call, or `TELLS`. `closed`: fail rather than go on without it. `counts`: errors
    count towards quarantine. `also`: states of the plugin, beside active, in which it is called. `watched`: False for
    what is Corral's own and on every request: only its errors are looked at.
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
    """The callable. `calls` and `seconds` are what it did since the start."""

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
        """A call of which only the errors are looked at."""
        try:
            return self.function(*arguments, **named)
        except BaseException as error:
            return self._failed(error)

    def tentatively(self, *arguments: Any, **named: Any) -> Any:
        """A call whose error is not counted, since it is tried again in another way; raises what it raises."""
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
        """The value, if it is of the kind that was agreed on; what shall be awaited is guarded while it is."""
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
        """What it comes to; whatever the plugin's state."""
        token = current_call.room.set(self.plugin)
        try:
            value = await Steps(self, working)
        except BaseException as error:
            return self._failed(error)
        finally:
            current_call.room.reset(token)
        return value if self.terms.expected.fits(value) else self._misfit(value)

    async def in_steps(self, *arguments: Any, **named: Any) -> Any:
        """The call of a coroutine function."""
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
            error._corral_plugin = self.loaded.name  # type: ignore[attr-defined]  # who calls on its behalf is innocent
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
    """Awaits in the name of a guard: a step that does not come back to the loop is given up like a call."""

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
    """An asynchronous iterator of a contribution; each step is guarded."""

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
    """The guard as what it guards: a coroutine function stays one for those who look."""
    if not inspect.iscoroutinefunction(guard.function) or guard.terms.expected.awaited is False:
        if not guard.terms.watched:
            return guard.unwatched
        return guard  # which tells a coroutine function where nobody awaits

    @functools.wraps(guard.function)
    async def run(*arguments: Any, **named: Any) -> Any:
        return await guard.in_steps(*arguments, **named)

    return run


def is_declared(error: BaseException) -> bool:
    """Whether it is an answer, of somebody else's making, or was counted where it arose."""
    if isinstance(error, Failure) or hasattr(error, "_corral_plugin"):
        return True
    return isinstance(translate(error), Failure)
