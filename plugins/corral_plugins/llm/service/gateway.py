"""The path of a call: a unit that checks and writes its row, the provider, a unit that settles."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from corral.auth.principal import Principal
from corral.database.engine import Work
from corral.database.unit import Entry
from corral.errors import Conflict, Forbidden, Problem
from corral.plugin import Settings
from corral_plugins.admin.api import KillSwitch
from corral_plugins.agents.api import AgentFacts, Agents
from corral_plugins.llm import settings as declared
from corral_plugins.llm.api import ProviderError
from corral_plugins.llm.service import calls
from corral_plugins.llm.service.calls import Ending
from corral_plugins.llm.service.failures import may_fall_back, problem_of
from corral_plugins.llm.service.plan import Plan, Served
from corral_plugins.llm.service.providers import Choice, Providers, Target
from corral_plugins.tasks.api import Tasks

log = logging.getLogger("corral.llm")
T = TypeVar("T")

QUEUED_CHUNKS = 64


class Gateway:
    """Implements `LLM`; the only writer of `llm_calls`."""

    agents: Agents | None
    tasks: Tasks | None
    switch: KillSwitch | None

    def __init__(self, work: Work, settings: Settings, providers: Providers) -> None:
        self._work, self._settings, self.providers = work, settings, providers
        self._running: set[asyncio.Task[Any]] = set()

    # -- what others ask

    def default_model(self) -> str:
        return self._settings.get(declared.DEFAULT_MODEL)

    def default_model_of(self, provider: str) -> str | None:
        return self.providers.default_of(provider)

    def is_known(self, provider: str) -> bool:
        return self.providers.get(provider) is not None

    def is_configured(self, provider: str) -> bool:
        return self.is_known(provider)

    def capabilities(self, model: str) -> dict[str, Any]:
        facts = self.providers.facts(model)
        return dict(facts.capabilities) if facts is not None else {}

    # -- calls

    async def complete(self, request: dict[str, Any], *, by: Principal) -> dict[str, Any]:
        return (await self.chat(request, by=by)).response

    async def chat(self, request: dict[str, Any], *, by: Principal) -> Served:
        """`complete`, with what served. Cancelling ends the provider's request; the row is settled all the same."""
        plan = await self._begin("chat", request, by)
        return await self._finish(
            self._one(plan, lambda target: target.provider.complete(self._for(plan, target), target.connection))
        )

    async def embed(self, request: dict[str, Any], *, by: Principal) -> dict[str, Any]:
        given = request["input"]
        request = {**request, "input": [given] if isinstance(given, str) else list(given)}
        plan = await self._begin("embedding", request, by)
        served = await self._finish(
            self._one(plan, lambda target: target.provider.embed(self._for(plan, target), target.connection))
        )
        return served.response

    async def stream(self, request: dict[str, Any], *, by: Principal) -> AsyncGenerator[dict[str, Any], None]:
        plan = await self._begin("chat", request, by)
        async with contextlib.aclosing(self.chunks(plan)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def begin_stream(self, request: dict[str, Any], *, by: Principal) -> Plan:
        """The first half of `stream`: checks and writes the row. The caller must then use and close `chunks(plan)`."""
        return await self._begin("chat", request, by)

    async def chunks(self, plan: Plan) -> AsyncGenerator[dict[str, Any], None]:
        """The answer in chunks, usage in the last one; closing it ends the provider's request."""
        queue: asyncio.Queue[dict[str, Any] | Exception | None] = asyncio.Queue(QUEUED_CHUNKS)
        task = self._spawn(self._pump(plan, queue))
        try:
            while (item := await queue.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            task.cancel()

    async def stop(self) -> None:
        """End what runs; every row is settled when this returns."""
        for task in tuple(self._running):
            if task.get_name() != "settle":
                task.cancel()
        while self._running:
            await asyncio.gather(*self._running, return_exceptions=True)

    # -- unit 1

    async def _begin(self, kind: str, request: dict[str, Any], by: Principal) -> Plan:
        entry = Entry(label=f"llm {kind}", actor=by.actor)
        began = time.monotonic()
        call_id, targets = await self._work(lambda: self._write(kind, str(request["model"]), by), entry=entry)
        return Plan(call_id, targets, request, by, entry, began)

    def _write(self, kind: str, asked: str, by: Principal) -> tuple[str, list[Target]]:
        if self.switch is not None:
            self.switch.refuse_if_engaged()
        self._check_caller(by)
        agent = self._agent(by)
        targets = Choice(self.providers, self.default_model()).candidates(asked, by, agent)
        first = targets[0]
        return calls.begin(kind, first.connection.name, first.model, asked, by), targets

    def _check_caller(self, by: Principal) -> None:
        """The lease must be the live one, and is renewed; people may have to go through tasks."""
        if by.lease_id is not None:
            if not self._lease_is_live(by):
                raise Conflict("The lease has ended; stop and discard.", code="lease_lost")
        elif by.kind in ("user", "api_key") and not self._settings.get(declared.ALLOW_DIRECT_USE):
            raise Forbidden("Models may be called by tasks only here (llm.allow_direct_use).")

    def _lease_is_live(self, by: Principal) -> bool:
        if by.lease_id is None or by.task_id is None:
            return True
        if self.tasks is None or self.tasks.live_lease(by.task_id, by.lease_id) is None:
            return False
        self.tasks.renew_one(by.task_id, by.lease_id)
        return True

    def _agent(self, by: Principal) -> AgentFacts | None:
        if by.agent_id is None:
            return None
        facts = self.agents.facts(by.agent_id) if self.agents is not None else None
        if facts is None:
            raise Forbidden("The agent of this token does not exist any more.")
        return facts

    # -- between the units

    def _for(self, plan: Plan, target: Target) -> dict[str, Any]:
        """The request as the target gets it: its own model name, only what it honours, and a cap on the answer."""
        sent = {key: value for key, value in plan.request.items() if key in target.provider.honours}
        sent |= {key: plan.request[key] for key in ("messages", "input") if key in plan.request}
        if "messages" in sent and sent.get("max_tokens") is None and sent.get("max_completion_tokens") is None:
            facts = self.providers.facts(target.name)
            cap = self._settings.get(declared.DEFAULT_MAX_TOKENS)
            sent["max_tokens"] = min(cap, facts.max_output_tokens or cap) if facts is not None else cap
        return {**sent, "model": target.model}

    async def _one(self, plan: Plan, call: Callable[[Target], Awaitable[dict[str, Any]]]) -> Served:
        """Call, falling back while failures say nothing about the request, and settle."""
        ending = plan.ending()
        alive = True
        try:
            async with self._deadline():
                target, response = await self._try(plan, call, ending)
            ending.note_answer(response)
        except ProviderError as failure:
            raise ending.note_failure(problem_of(failure, ending.provider)) from failure
        except Exception as error:
            ending.note_failure(error)
            raise
        finally:
            alive = await self._settle(plan, ending)
        if not alive:
            raise Conflict("The lease ended during the call; stop and discard.", code="lease_lost")
        response["model"] = target.name
        return Served(response, plan.call_id, target.name, plan.ignored(target))

    async def _try(self, plan: Plan, call: Callable[[Target], Awaitable[T]], ending: Ending) -> tuple[Target, T]:
        for place, target in enumerate(plan.targets, 1):
            ending.provider, ending.model, ending.attempts = target.connection.name, target.model[:200], place
            try:
                return target, await call(target)
            except ProviderError as failure:
                if place == len(plan.targets) or not may_fall_back(failure):
                    raise
                log.info("falling back", extra={"model": target.name, "status": failure.status})
        raise AssertionError("a plan has at least one target")

    async def _pump(self, plan: Plan, queue: asyncio.Queue[dict[str, Any] | Exception | None]) -> None:
        """Put chunks into the queue; usage only after the row is settled. Problems go the same way."""
        ending = plan.ending()
        last: dict[str, Any] | None = None
        problem: Exception | None = None
        try:
            async with self._deadline():
                target, (iterator, chunk) = await self._try(plan, lambda target: self._first(plan, target), ending)
                ending.first_token_ms = _since(plan.began)
                async with contextlib.aclosing(iterator):
                    while chunk is not None:
                        chunk["model"] = target.name
                        ending.note_chunk(chunk)
                        if chunk.get("usage"):
                            last = {**chunk, "choices": []}
                            del chunk["usage"]
                        if chunk.get("choices"):
                            await queue.put(chunk)
                        chunk = await anext(iterator, None)
            ending.status = "completed"
        except ProviderError as failure:
            problem = ending.note_failure(problem_of(failure, ending.provider))
        except Exception as error:
            problem = ending.note_failure(error)
        finally:
            alive = await self._settle(plan, ending)
        if not alive and problem is None:
            problem = Conflict("The lease ended during the call; stop and discard.", code="lease_lost")
        for item in (problem,) if problem is not None else (last, None):
            await queue.put(item)

    async def _first(self, plan: Plan, target: Target) -> tuple[Any, dict[str, Any] | None]:
        """The provider's stream and its first chunk, after which nothing falls back."""
        iterator = target.provider.stream(self._for(plan, target), target.connection)
        return iterator, await anext(iterator, None)

    @contextlib.asynccontextmanager
    async def _deadline(self) -> AsyncGenerator[None, None]:
        seconds = self._settings.get(declared.TOTAL_TIMEOUT_SECONDS)
        try:
            async with asyncio.timeout(seconds):
                yield
        except TimeoutError:
            raise Problem(f"The model did not answer within {seconds} seconds.", code="upstream_timeout") from None

    # -- unit 2

    async def _settle(self, plan: Plan, ending: Ending) -> bool:
        """Write how it went; whether the lease still lives. Nothing cuts it: it runs in a task of its own."""
        ending.duration_ms = _since(plan.began)

        def unit() -> bool:
            if calls.settle(plan.call_id, ending):
                self._charge(plan.by, ending)
            return self._lease_is_live(plan.by)

        return await asyncio.shield(self._spawn(self._work(unit, entry=plan.entry), name="settle"))

    def _charge(self, by: Principal, ending: Ending) -> None:
        """What a call used is the task's, whatever became of its lease. A call that reached no provider is none."""
        if self.tasks is not None and by.task_id is not None and by.lease_id is not None and ending.attempts:
            self.tasks.spent(
                by.task_id, by.lease_id, input_tokens=ending.input_tokens, output_tokens=ending.output_tokens
            )

    async def _finish(self, work: Coroutine[Any, Any, T]) -> T:
        """Run in a task of its own: a caller that leaves cancels the provider's request, not the settling."""
        task = self._spawn(work)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.cancel()
            raise

    def _spawn(self, work: Coroutine[Any, Any, T], *, name: str = "call") -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._running.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if not task.cancelled():
            task.exception()  # told to the caller, if there still is one


def _since(began: float) -> int:
    return round((time.monotonic() - began) * 1000)
