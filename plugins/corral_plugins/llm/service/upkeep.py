"""Looking after providers: asking them for their models, and trying one with a short real call."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec

from corral import clock
from corral.auth.principal import Principal
from corral.database.engine import Work
from corral.egress.client import Egress
from corral.errors import Conflict, Invalid, Problem
from corral.ids import new_id
from corral.jobs.job import enqueue
from corral.redact.redactor import Redactor
from corral_plugins.llm.api import Connection, ModelFacts, ProviderError
from corral_plugins.llm.kinds.clients import address
from corral_plugins.llm.provider_shapes import ProviderTest
from corral_plugins.llm.service.answers import failures_of
from corral_plugins.llm.service.failures import problem_of, timed_out
from corral_plugins.llm.service.gateway import Gateway
from corral_plugins.llm.service.keys import ProviderKeys
from corral_plugins.llm.service.provider import Provider
from corral_plugins.llm.service.registry import Registry
from corral_plugins.llm.service.states import change

log = logging.getLogger("corral.llm")

Ask = Callable[[Connection], Awaitable[Sequence[ModelFacts]]]

REFRESH_JOB = "llm.refresh_provider"
QUESTION = [{"role": "user", "content": "Reply with the word OK."}]
ANSWER_TOKENS = 64


class Upkeep:
    """Opens its own units."""

    def __init__(
        self, work: Work, registry: Registry, gateway: Gateway, keys: ProviderKeys, redactor: Redactor
    ) -> None:
        self._work, self._registry, self._gateway, self._keys = work, registry, gateway, keys
        self._redactor = redactor

    async def refresh(self, provider: Provider) -> None:
        """Ask a provider for its models and keep them. Raises what a call of it would."""
        ask = getattr(provider.kind, "refresh", None)
        if ask is None:
            return
        if not provider.usable:
            raise Conflict(f"{provider.name} is not configured, or switched off.")
        try:
            found = await self._found(provider, ask)
        except ProviderError as failure:
            problem = problem_of(failure, provider.name, self._redactor)
            error = {"code": problem.code, "detail": problem.detail, "at": clock.now()}
            await self._work(lambda: change(provider.name, last_error=error))
            if isinstance(problem, Invalid):  # the request was not the caller's
                problem = Problem(problem.detail, code="provider_error")
            raise problem from failure
        values: dict[str, Any] = {"found_models": found, "stamp": new_id(), "models_refreshed_at": clock.now()}
        await self._work(lambda: change(provider.name, **values, last_ok_at=clock.now(), last_error=None))

    async def _found(self, provider: Provider, ask: Ask) -> list[ModelFacts]:
        """What the provider lists, as it can be kept. It has as long as for an answer."""
        patience = provider.connection.timeouts.total_seconds
        connection = await self._keys.connection(provider)
        try:
            async with asyncio.timeout(patience) as scope:
                with failures_of(provider.name):
                    return msgspec.convert(msgspec.to_builtins(await ask(connection)), list[ModelFacts])
        except TimeoutError:
            if not scope.expired():
                raise
            raise timed_out(provider.name, patience, "no list of models") from None

    def refresh_new(self) -> None:
        """Have those asked that nobody has asked yet; joins the caller's unit."""
        for provider in self._registry.all():
            if provider.is_asked and not provider.connection.models:
                refresh_soon(provider.name)

    async def refresh_all(self) -> None:
        """Ask every provider whose models are whatever it lists; one that fails keeps those it had."""
        for provider in await self._work(self._registry.all, read=True):
            if provider.is_asked:
                await self._try_refresh(provider)

    async def refresh_named(self, name: str) -> None:
        """The same for one, if it is still there."""
        provider = await self._work(lambda: self._registry.get(name), read=True)
        if provider is not None and provider.is_asked:
            await self._try_refresh(provider)

    async def _try_refresh(self, provider: Provider) -> None:
        try:
            await self.refresh(provider)
        except Problem as problem:
            log.warning(
                "the models of a provider cannot be read", extra={"provider": provider.name, "detail": problem.detail}
            )

    async def test(self, provider: Provider, model: str | None, by: Principal) -> ProviderTest:
        """One short call; it costs what it costs. Failures are told in the answer."""
        name = model or provider.first_model()
        if name is None:
            raise Invalid.at("/model", "required", "The provider lists no models yet; name one.")
        began = time.monotonic()
        result = ProviderTest(ok=False, model=f"{provider.name}/{name}", latency_ms=0, first_token_ms=None, error=None)
        request = {"model": result.model, "messages": QUESTION, "max_tokens": ANSWER_TOKENS}
        try:
            async with contextlib.aclosing(self._gateway.stream(request, by=by)) as chunks:
                async for _ in chunks:
                    if result.first_token_ms is None:
                        result.first_token_ms = _since(began)
            result.ok = True
        except Problem as problem:
            result.error = {"code": problem.code, "detail": problem.detail}
        result.latency_ms = _since(began)
        return result


async def judged(egress: Egress, url: Any) -> list[str]:
    """Warnings about an address that is to be stored; `url_blocked` says what the operator would have to allow."""
    if not isinstance(url, str):
        return []
    try:
        return await egress.at_save(url)
    except Invalid as problem:
        if problem.code == "url_blocked" and problem.errors[0].code == "egress.address":
            with contextlib.suppress(ValueError):  # it is no URL, so nobody could open it
                problem.detail += f" An operator may open it: CORRAL_EGRESS_ALLOW={address(url)}."
        raise


def refresh_soon(name: str) -> None:
    """Have a provider's models read after the current unit commits."""
    enqueue(REFRESH_JOB, provider=name)


def _since(began: float) -> int:
    return round((time.monotonic() - began) * 1000)
