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
from corral.errors import Problem, Unavailable
from corral.plugin import Settings
from corral.redact.redactor import Redactor
from corral_plugins.llm import settings as declared
from corral_plugins.llm.api import Connection, ProviderError
from corral_plugins.llm.service.admission import Admission
from corral_plugins.llm.service.answers import completion, embeddings, failures_of
from corral_plugins.llm.service.attempts import Attempts
from corral_plugins.llm.service.failures import is_about_credentials, lease_lost, problem_of
from corral_plugins.llm.service.keys import ProviderKeys
from corral_plugins.llm.service.limits import cap_of, explicit_cap
from corral_plugins.llm.service.outcome import Outcome, estimate_input
from corral_plugins.llm.service.payloads import Payloads
from corral_plugins.llm.service.plan import Plan, Served
from corral_plugins.llm.service.redaction import StreamRedaction, answered_to, asked_by, redacted
from corral_plugins.llm.service.registry import Registry, Target
from corral_plugins.llm.service.settlement import Settlement
from corral_plugins.llm.service.slots import Ticket
from corral_plugins.llm.service.streams import Answer, first_chunk, in_time, relayed
from corral_plugins.llm.service.watch import LeaseWatch

log = logging.getLogger("corral.llm")
T = TypeVar("T")
Chunk = dict[str, Any]
Ask = Callable[[dict[str, Any], Connection], Awaitable[dict[str, Any]]]

QUEUED_CHUNKS = 64
SETTLE_PAUSES = (0.2, 1.0, 3.0)
KEPT = "settle"  # the name of tasks that run to their end


class Gateway:
    """Implements `LLM`; the only one that calls providers."""

    def __init__(
        self,
        work: Work,
        settings: Settings,
        redactor: Redactor,
        registry: Registry,
        admission: Admission,
        attempts: Attempts,
        settlement: Settlement,
        watch: LeaseWatch,
        payloads: Payloads,
        keys: ProviderKeys,
    ) -> None:
        self._work, self._settings, self._redactor = work, settings, redactor
        self.registry, self._admission, self._attempts = registry, admission, attempts
        self._settlement, self._watch, self._payloads, self._keys = settlement, watch, payloads, keys
        self._running: set[asyncio.Task[Any]] = set()

    # -- what others ask

    def default_model(self) -> str:
        return self._admission.default_model()

    def default_model_of(self, provider: str) -> str | None:
        found = self.registry.get(provider)
        return found.first_model() if found is not None else None

    def is_known(self, provider: str) -> bool:
        return self.registry.get(provider) is not None

    def is_configured(self, provider: str) -> bool:
        found = self.registry.get(provider)
        return found is not None and found.usable

    def capabilities(self, model: str) -> dict[str, Any]:
        facts = self.registry.facts(model)
        return dict(facts.capabilities) if facts is not None else {}

    # -- calls

    async def complete(self, request: dict[str, Any], *, by: Principal) -> dict[str, Any]:
        return (await self.chat(request, by=by)).response

    async def chat(self, request: dict[str, Any], *, by: Principal) -> Served:
        """`complete`, with what served. Cancelling ends the provider's request; the row is settled all the same."""
        plan = await self._begin("chat", request, by)
        return await self._finish(
            self._one(plan, lambda target: self._call(plan, target, target.provider.kind.complete))
        )

    async def embed(self, request: dict[str, Any], *, by: Principal) -> dict[str, Any]:
        return (await self.embeddings(request, by=by)).response

    async def embeddings(self, request: dict[str, Any], *, by: Principal) -> Served:
        """`embed`, with what served."""
        given = request["input"]
        request = {**request, "input": [given] if isinstance(given, str) else list(given)}
        plan = await self._begin("embedding", request, by)
        return await self._finish(self._one(plan, lambda target: self._call(plan, target, target.provider.kind.embed)))

    async def stream(self, request: dict[str, Any], *, by: Principal) -> AsyncGenerator[Chunk, None]:
        plan = await self._begin("chat", request, by)
        async with contextlib.aclosing(self.chunks(plan)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def begin_stream(self, request: dict[str, Any], *, by: Principal) -> Plan:
        """The first half of `stream`: checks and writes the row. The caller must then use and close `chunks(plan)`."""
        return await self._begin("chat", request, by)

    async def chunks(self, plan: Plan) -> AsyncGenerator[Chunk, None]:
        """The answer in chunks, usage in the last one; closing it ends the provider's request."""
        queue: asyncio.Queue[Chunk | Exception | None] = asyncio.Queue(QUEUED_CHUNKS)
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
            if task.get_name() != KEPT:
                task.cancel()
        while self._running:
            await asyncio.gather(*self._running, return_exceptions=True)

    # -- unit 1

    async def _begin(self, kind: str, request: dict[str, Any], by: Principal) -> Plan:
        began = time.monotonic()
        tokens = estimate_input(request)
        with asked_by(by):
            request = await redacted(self._redactor, request, tokens)
        entry = Entry(label=f"llm {kind}", actor=by.actor)

        async def admit() -> Plan:
            admitted = await self._work(lambda: self._admission.admit(kind, request, tokens, by), entry=entry)
            return Plan(
                call_id=admitted.call_id,
                kind=kind,
                targets=admitted.targets,
                ticket=admitted.ticket,
                request=request,
                input_tokens=tokens,
                by=by,
                entry=entry,
                began=began,
            )

        admitting = self._spawn(admit(), name=KEPT)
        try:
            return await asyncio.shield(admitting)
        except asyncio.CancelledError:
            self._spawn(self._abandon(admitting), name=KEPT)
            raise

    async def _abandon(self, admitting: asyncio.Task[Plan]) -> None:
        """Nobody waits for a call that was just begun: what unit 1 wrote is settled."""
        with contextlib.suppress(Problem):
            plan = await admitting
            await self._settle(plan, plan.outcome())

    # -- between the units

    def _for(self, plan: Plan, target: Target) -> dict[str, Any]:
        """The request as the target gets it: its own model name, only what it honours, and a cap on the answer."""
        honoured = target.provider.honours
        sent = {key: value for key, value in plan.request.items() if key in honoured}
        sent |= {key: plan.request[key] for key in ("messages", "input") if key in plan.request}
        if "messages" in sent and explicit_cap(sent) is None:
            facts = self.registry.facts(target.name)
            sent["max_tokens"] = cap_of(facts, plan.input_tokens, self._settings.get(declared.DEFAULT_MAX_TOKENS))
        return {**sent, "model": target.model}

    async def _call(self, plan: Plan, target: Target, ask: Ask) -> dict[str, Any]:
        request, connection = self._for(plan, target), await self._keys.connection(target.provider)
        with failures_of(target.provider.name):
            answer = await ask(request, connection)
            return completion(answer) if plan.kind == "chat" else embeddings(answer)

    async def _one(self, plan: Plan, call: Callable[[Target], Awaitable[dict[str, Any]]]) -> Served:
        """Call, falling back while failures say nothing about the request, and settle."""
        outcome = plan.outcome()
        response = await self._settled(plan, outcome, self._answer(plan, outcome, call))
        response |= {"model": outcome.target.name, "usage": outcome.usage()}
        ignored = plan.ignored(outcome.target)
        return Served(response, plan.call_id, outcome.target.name, ignored, outcome.cost_header())

    async def _answer(
        self, plan: Plan, outcome: Outcome, call: Callable[[Target], Awaitable[dict[str, Any]]]
    ) -> dict[str, Any]:
        """The whole answer; vectors hold no text."""
        response = await self._attempts.run(plan, outcome, lambda target: in_time(target, call(target)))
        outcome.note_answer(response)
        if plan.kind == "chat":
            with answered_to(plan.by, outcome.target.provider.name):
                response = await redacted(self._redactor, response, outcome.output_bytes // 4)
            outcome.response = response
        return response

    async def _pump(self, plan: Plan, queue: asyncio.Queue[Chunk | Exception | None]) -> None:
        """Put chunks into the queue; usage only after the row is settled. Problems go the same way, after all text."""
        outcome = plan.outcome()
        redaction = StreamRedaction(self._redactor, lambda: answered_to(plan.by, outcome.target.provider.name))
        unsent: list[Chunk] = []
        try:
            last = await self._settled(plan, outcome, self._relay(plan, outcome, redaction, queue, unsent))
        except Exception as problem:
            rest: list[Chunk | Exception | None] = [*unsent, *redaction.end(), problem]
        else:
            rest = [last, None]
        for item in rest:
            await queue.put(item)

    async def _relay(
        self,
        plan: Plan,
        outcome: Outcome,
        redaction: StreamRedaction,
        queue: asyncio.Queue[Chunk | Exception | None],
        unsent: list[Chunk],
    ) -> Chunk:
        """Put all chunks but the last one, which is returned. `unsent`: there was no room before it was cancelled."""

        async def first(target: Target) -> tuple[Target, AsyncGenerator[Chunk, None], Chunk]:
            connection = await self._keys.connection(target.provider)
            return target, *(await first_chunk(target, self._for(plan, target), connection))

        target, iterator, chunk = await self._attempts.run(plan, outcome, first)
        outcome.first_token_ms = _since(plan.began)
        answer = Answer() if self._payloads.wants_answers() else None
        last: Chunk = {}
        async with contextlib.aclosing(relayed(target, iterator, chunk, redaction, outcome)) as chunks:
            async for ready in chunks:
                if ready["choices"]:
                    if answer is not None:
                        answer.add(ready)
                    unsent.append(ready)
                    await queue.put(ready)
                    unsent.clear()
                else:
                    last = ready
        outcome.response = answer.message() if answer is not None else None
        return last

    async def _settled(self, plan: Plan, outcome: Outcome, call: Coroutine[Any, Any, T]) -> T:
        """What the call gives; it is settled however it ends. Failures are raised as problems."""
        try:
            async with self._limits(plan):
                result = await call
            outcome.status = "completed"
        except ProviderError as failure:
            raise self._failed(outcome, failure) from failure
        except Exception as error:
            outcome.note_failure(error)
            raise
        finally:
            alive = await self._settle(plan, outcome)
        if not alive:
            raise lease_lost()
        return result

    @contextlib.asynccontextmanager
    async def _limits(self, plan: Plan) -> AsyncGenerator[None, None]:
        """The lease, and the time that a call may take with all retries and fallbacks."""
        seconds = self._settings.get(declared.TOTAL_TIMEOUT_SECONDS)
        try:
            async with asyncio.timeout(seconds) as scope, self._watch.over(plan.by):
                yield
        except TimeoutError:
            if not scope.expired():
                raise
            raise Problem(f"The model did not answer within {seconds} seconds.", code="upstream_timeout") from None

    def _failed(self, outcome: Outcome, failure: ProviderError) -> Problem:
        """What the caller is told, without credentials that the provider may have repeated."""
        problem = problem_of(failure, outcome.target.provider.name, self._redactor)
        outcome.credentials_refused = is_about_credentials(problem)
        outcome.note_failure(problem)
        return problem

    # -- unit 2

    async def _settle(self, plan: Plan, outcome: Outcome) -> bool:
        """Write how it went; whether the lease still lives. Nothing cuts it: it runs in a task of its own."""
        outcome.duration_ms = _since(plan.began)
        return await asyncio.shield(self._spawn(self._written(plan, outcome, plan.ticket), name=KEPT))

    async def _written(self, plan: Plan, outcome: Outcome, ticket: Ticket | None) -> bool:
        """What was used is not lost because the database is busy for a moment, nor because of what was answered."""

        def settle() -> bool:
            return self._settlement.settle(plan, outcome, ticket)

        try:
            for pause in SETTLE_PAUSES:
                with contextlib.suppress(Unavailable):
                    return await self._work(settle, entry=plan.entry)
                await asyncio.sleep(pause)
            return await self._work(settle, entry=plan.entry)
        except Exception:
            log.exception("a call cannot be settled", extra={"call": plan.call_id})
            await self._work(lambda: self._settlement.settle_least(plan, outcome, ticket), entry=plan.entry)
            raise

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
