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
        """Declare the names of the circuit breakers, one for each provider that can be called."""
        if self.breakers is not None:
            self.breakers.declare(PREFIX, self._names, slow_call_seconds=SLOW_SECONDS)

    def _names(self) -> list[str]:
        return [breaker_name(each.name) for each in self._registry.all_providers() if each.usable]

    async def guard(self, provider: Provider, call: Callable[[], Awaitable[T]]) -> T:
        """Make a call to a provider.

        If the provider's circuit breaker is open, raise `ProviderError` (`circuit_open`).
        """
        if self.breakers is None:
            return await call()
        try:
            return await self.breakers.guard(breaker_name(provider.name), call, judge=_classify_response)
        except CircuitOpen as error:
            raise ProviderError(503, error.detail, code=error.code, retry_after=error.retry_after) from None

    def state(self, provider: str) -> State | None:
        """Return the state of a provider's circuit breaker, or None if the `circuit_breakers` plugin is not active."""
        return None if self.breakers is None else self.breakers.state(breaker_name(provider))

    def blocked_until(self, provider: str) -> str | None:
        """Return the instant until which a provider's circuit breaker rejects calls.

        Return None if the circuit breaker might admit a call.
        """
        return None if self.breakers is None else self.breakers.blocked_until(breaker_name(provider))

    def is_forced_open(self, provider: str) -> bool:
        """Return whether an admin forced a provider's circuit breaker open."""
        return self.breakers is not None and self.breakers.is_forced(breaker_name(provider))

    def open_providers(self) -> list[str]:
        """Return the names of enabled providers whose circuit breakers are not closed. Runs in a unit of work."""
        usable = [each.name for each in self._registry.all_providers() if each.usable]
        return [name for name in usable if self.state(name) not in (None, "closed")]

    def admitted(self, targets: list[ModelTarget]) -> list[ModelTarget]:
        """Return the targets whose circuit breakers might admit a call. Raise `CircuitOpen` if there are none.

        Calls to the other targets are not queued, because their circuit breakers are open.
        """
        blocked = {target.provider.name: self.blocked_until(target.provider.name) for target in targets}
        admitted = [target for target in targets if blocked[target.provider.name] is None]
        if not admitted:
            until, name = min((until, name) for name, until in blocked.items() if until is not None)
            raise CircuitOpen(breaker_name(name), retry_at=until)
        return admitted


def breaker_name(provider: str) -> str:
    """Return the name of a provider's circuit breaker."""
    return f"{PREFIX}:{provider}"


def _classify_response(outcome: Any) -> Verdict:
    """Classify a call for the circuit breaker by the status of the provider's response.

    Invalid requests are not counted as failures.
    """
    if isinstance(outcome, ProviderError):
        return judge_status(outcome.status)
    return "neutral" if isinstance(outcome, Exception) else "success"
