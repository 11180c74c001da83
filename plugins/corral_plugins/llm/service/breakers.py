"""The circuit breakers of providers: `llm:<provider>` guards every call to the provider."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from corral_plugins.circuit_breakers.api import Breakers, CircuitOpen, State, Verdict, judge_status
from corral_plugins.llm.api import ProviderError
from corral_plugins.llm.service.registry import ModelTarget, Provider, ProviderRegistry

T = TypeVar("T")
PREFIX = "llm"
SLOW_SECONDS = 120  # to the first token of a stream, or to a whole response


class ProviderBreakers:
    """Guards the calls to providers. If the `circuit_breakers` plugin is not active, every call is admitted."""

    breakers: Breakers | None

    def __init__(self, registry: ProviderRegistry) -> None:
        self._registry = registry

    def declare(self) -> None:
        """Declare the names of the breakers: one breaker for each provider that can be called."""
        if self.breakers is not None:
            self.breakers.declare(PREFIX, self._names, slow_call_seconds=SLOW_SECONDS)

    def _names(self) -> list[str]:
        return [breaker_name(each.name) for each in self._registry.all_providers() if each.usable]

    async def guard(self, provider: Provider, call: Callable[[], Awaitable[T]]) -> T:
        """Make a call to a provider. Raise `ProviderError` with the code `circuit_open` if its breaker is open."""
        if self.breakers is None:
            return await call()
        try:
            return await self.breakers.guard(breaker_name(provider.name), call, judge=_judge)
        except CircuitOpen as error:
            raise ProviderError(503, error.detail, code=error.code, retry_after=error.retry_after) from None

    def state(self, provider: str) -> State | None:
        """Return the state of a provider's breaker, or None without the `circuit_breakers` plugin."""
        return None if self.breakers is None else self.breakers.state(breaker_name(provider))

    def blocked_until(self, provider: str) -> str | None:
        """Return the instant until which a provider's breaker rejects calls, or None if it may admit a call."""
        return None if self.breakers is None else self.breakers.blocked_until(breaker_name(provider))

    def is_forced_open(self, provider: str) -> bool:
        """Return whether an admin forced a provider's breaker open."""
        return self.breakers is not None and self.breakers.is_forced(breaker_name(provider))

    def open_providers(self) -> list[str]:
        """Return the names of the enabled providers whose breakers are not closed. Runs in a unit of work."""
        usable = [each.name for each in self._registry.all_providers() if each.usable]
        return [name for name in usable if self.state(name) not in (None, "closed")]

    def admitted(self, targets: list[ModelTarget]) -> list[ModelTarget]:
        """Return the targets whose breakers may admit a call. Raise `CircuitOpen` if there are none.

        The breakers of the other targets are open, so calls to these are not even queued.
        """
        blocked = {target.provider.name: self.blocked_until(target.provider.name) for target in targets}
        admitted = [target for target in targets if blocked[target.provider.name] is None]
        if not admitted:
            until, name = min((until, name) for name, until in blocked.items() if until is not None)
            raise CircuitOpen(breaker_name(name), retry_at=until)
        return admitted


def breaker_name(provider: str) -> str:
    """Return the name of the breaker of a provider."""
    return f"{PREFIX}:{provider}"


def _judge(outcome: Any) -> Verdict:
    """Classify a call for the breaker: only the status of the provider's response counts, not faults of the request."""
    if isinstance(outcome, ProviderError):
        return judge_status(outcome.status)
    return "neutral" if isinstance(outcome, Exception) else "success"
