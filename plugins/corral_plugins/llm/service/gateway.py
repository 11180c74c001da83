"""The gateway to model providers: admits each call, sends it, and stores its outcome.

One unit of work admits the call, and another stores its outcome after the provider has responded.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from typing import Any, TypeVar

import msgspec

from corral.auth.principal import Principal
from corral.database.engine import Work
from corral.database.unit import UnitContext
from corral.errors import Problem, Unavailable
from corral.plugin import Settings
from corral.redact.redactor import Redactor
from corral_plugins.cost.api import BudgetRefused
from corral_plugins.llm.api import AgentModel, ProviderError
from corral_plugins.llm.service.admission import (
    CallAdmission,
    ConfiguredModels,
    ModelResolver,
)
from corral_plugins.llm.service.breakers import ProviderBreakers
from corral_plugins.llm.service.call_budgets import CallBudgets
from corral_plugins.llm.service.calls import (
    UNPRICED,
    CallOutcome,
    CallRecord,
    CallResult,
    PayloadStore,
    estimate_input,
    inputs_of,
)
from corral_plugins.llm.service.cancellable_calls import CallTask, CallTasks
from corral_plugins.llm.service.dispatch import CallDispatcher
from corral_plugins.llm.service.provider_keys import ProviderKeys
from corral_plugins.llm.service.registry import ModelTarget, ProviderRegistry
from corral_plugins.llm.service.responses import (
    convert_provider_errors,
    is_about_credentials,
    normalize_completion,
    normalize_embeddings,
    problem_of,
    time_limit,
)
from corral_plugins.llm.service.settlement import CallSettlement
from corral_plugins.llm.service.streams import (
    AssembledMessage,
    Chunk,
    StreamRedaction,
    attribute_request_text,
    attribute_response_text,
    open_stream,
    redact_value,
    relay_stream,
)
from corral_plugins.llm.service.task_leases import CallLeases, lease_lost_error
from corral_plugins.llm.service.token_caps import default_cap, requested_cap
from corral_plugins.llm.settings import TOTAL_TIMEOUT_SECONDS

log = logging.getLogger("corral.llm")
T = TypeVar("T")
ChunkQueue = asyncio.Queue[Chunk | Exception | None]

QUEUED_CHUNKS = 64
MAX_FINISH_REASON = 40  # characters
SETTLE_RETRY_SECONDS = (0.2, 1.0, 3.0)


class Gateway:
    """Implements `LLM`. All calls to providers go through this class."""

    def __init__(
        self,
        work: Work,
        settings: Settings,
        redactor: Redactor,
        registry: ProviderRegistry,
        resolver: ModelResolver,
        admission: CallAdmission,
        budgets: CallBudgets,
        dispatcher: CallDispatcher,
        settlement: CallSettlement,
        leases: CallLeases,
        payloads: PayloadStore,
        keys: ProviderKeys,
        breakers: ProviderBreakers,
    ) -> None:
        self._work, self._settings, self._redactor = work, settings, redactor
        self.registry, self._resolver, self._admission = registry, resolver, admission
        self._dispatcher, self._settlement, self._leases = dispatcher, settlement, leases
        self._payloads, self._keys, self._breakers, self._budgets = payloads, keys, breakers, budgets
        self._tasks = CallTasks()

    # -- queries

    def models_for_agent(self, provider: str | None, model: str | None, fallbacks: Sequence[str]) -> list[AgentModel]:
        return self._resolver.models_for_agent(ConfiguredModels(provider, model, fallbacks))

    def is_known(self, provider: str) -> bool:
        return self.registry.get_provider(provider) is not None

    def capabilities(self, model: str) -> dict[str, Any]:
        info = self.registry.model_info(model)
        return dict(info.capabilities) if info is not None else {}

    # -- calls

    async def complete(
        self, request: dict[str, Any], *, by: Principal, run_id: str | None = None, max_cost_usd: float | None = None
    ) -> dict[str, Any]:
        limit = None if max_cost_usd is None else round(max_cost_usd * 1e6)
        result = await self.complete_chat(request, by=by, run_id=run_id, limit_micro=limit)
        cost = None if result.cost == UNPRICED else float(result.cost)
        return {**result.response, "corral": {"cost_usd": cost}}

    async def complete_chat(
        self, request: dict[str, Any], *, by: Principal, run_id: str | None = None, limit_micro: int | None = None
    ) -> CallResult:
        """Return a chat completion together with the metadata of the call."""
        return await self._run_task(
            lambda task: self._complete_call(task, "chat", request, by, limit_micro=limit_micro, run_id=run_id)
        )

    async def embed(self, request: dict[str, Any], *, by: Principal) -> dict[str, Any]:
        return (await self.create_embeddings(request, by=by)).response

    async def create_embeddings(self, request: dict[str, Any], *, by: Principal) -> CallResult:
        """Return embeddings together with the metadata of the call."""
        request = {**request, "input": inputs_of(request["input"])}
        return await self._run_task(lambda task: self._complete_call(task, "embedding", request, by))

    async def stream(self, request: dict[str, Any], *, by: Principal) -> AsyncGenerator[Chunk, None]:
        call = await self.begin_stream(request, by=by)
        async with contextlib.aclosing(self.stream_chunks(call)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def begin_stream(self, request: dict[str, Any], *, by: Principal) -> CallRecord:
        """Admit a streaming call and store its record.

        The caller must then pass the record to `stream_chunks`, and must close the returned iterator.
        """
        return await self._run_task(lambda task: self._admit_call(task, "chat", request, by))

    async def stream_chunks(self, call: CallRecord) -> AsyncGenerator[Chunk, None]:
        """Yield the chunks of the response, with the token usage in the last one.

        Closing the iterator cancels the request to the provider.
        """
        queue: ChunkQueue = asyncio.Queue(QUEUED_CHUNKS)
        task = self._tasks.start(lambda task: self._stream_into(task, queue, call))
        try:
            while (item := await queue.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            task.cancel()

    async def stop(self) -> None:
        """Cancel running calls, and return when the outcomes of all calls have been stored."""
        await self._tasks.stop()

    async def _run_task(self, run: Callable[[CallTask[T]], Coroutine[Any, Any, T]]) -> T:
        """Run a call, or its admission, in its own asyncio task.

        If the caller disconnects, the upstream request is cancelled, but the outcome of the call is still stored.
        """
        running = self._tasks.start(run)
        try:
            return await asyncio.shield(running.task)
        except asyncio.CancelledError:
            running.cancel()
            raise

    # -- the unit of work that admits a call

    async def _admit_call(
        self, task: CallTask[Any], kind: str, request: dict[str, Any], by: Principal, limit_micro: int | None = None
    ) -> CallRecord:
        """Admit a call and return its record.

        If the asyncio task is cancelled in the meantime, store the outcome of the call.
        """
        started = time.monotonic()
        tokens = estimate_input(request)
        with attribute_request_text(by):
            request = await redact_value(self._redactor, request, tokens)
        entry = UnitContext(label=f"llm {kind}", actor=by.actor)

        def admit() -> CallRecord:
            return self._admission.admit(kind, request, tokens, by, entry, started, limit_micro)

        call: CallRecord | None = None
        try:
            with task.protected():
                call = await self._admit(admit, by, entry)
        except asyncio.CancelledError:
            if call is not None:
                await self._settle_call(task, call, call.new_outcome())
            raise
        return call

    async def _admit(self, admit: Callable[[], CallRecord], by: Principal, entry: UnitContext) -> CallRecord:
        try:  # not durable: nobody is told of an admission, and a loss of power ends the call
            return await self._work(admit, entry=msgspec.structs.replace(entry, durable=False))
        except BudgetRefused as refused:
            if by.lease_id is not None:
                await self._work(functools.partial(self._budgets.report_refusal, by, refused), entry=entry)
            raise

    # -- the provider call, between both units of work

    async def _complete_call(
        self,
        task: CallTask[Any],
        kind: str,
        request: dict[str, Any],
        by: Principal,
        *,
        limit_micro: int | None = None,
        run_id: str | None = None,
    ) -> CallResult:
        """Admit a call, send it, store its outcome, and then return the result."""
        call = await self._admit_call(task, kind, request, by, limit_micro)
        call.run_id = run_id
        outcome = call.new_outcome()
        response = await self._settle_and_return(task, call, outcome, self._request_response(call, outcome))
        target = outcome.target
        response |= {"model": target.name, "usage": outcome.usage()}
        headers = (outcome.cost_header(), outcome.budget_header())
        return CallResult(response, call.id, target.name, call.ignored_fields(target), *headers)

    async def _request_response(self, call: CallRecord, outcome: CallOutcome) -> dict[str, Any]:
        """Send a request to a provider, and return the whole response.

        Chat completions are redacted. Embeddings are not redacted, because they contain no text.
        """
        response = await self._dispatcher.send_call(call, outcome, functools.partial(self._send_to_target, call))
        outcome.status = "completed"
        outcome.add_chunk(response)
        if call.kind == "chat":
            with attribute_response_text(call.by, outcome.target.provider.name):
                response = await redact_value(self._redactor, response, outcome.output_bytes // 4)
            outcome.response = response
        return response

    async def _send_to_target(self, call: CallRecord, target: ModelTarget) -> dict[str, Any]:
        provider = target.provider
        request, connection = self._request_for(call, target), await self._keys.connection_with_key(provider)

        async def request_response() -> dict[str, Any]:
            async with time_limit(target.name, provider.connection.timeouts.total_seconds, "no response"):
                with convert_provider_errors(provider.name):
                    if call.kind == "chat":
                        return normalize_completion(await provider.kind.complete(request, connection))
                    return normalize_embeddings(await provider.kind.embed(request, connection))

        return await self._breakers.guard(provider, request_response)

    def _request_for(self, call: CallRecord, target: ModelTarget) -> dict[str, Any]:
        """Return the request to send to a target.

        The request contains the fields that the provider supports and the target's model name. A chat request without a
        token limit receives the default limit, in the field determined by the provider's kind.
        """
        request, provider = call.fields_for(target), target.provider
        if call.kind == "chat" and requested_cap(request) is None:
            choose = getattr(provider.kind, "cap_field_of", None)
            info = self.registry.model_info(target.name)
            cap_field = "max_tokens" if choose is None else choose(provider.connection)
            request[cap_field] = default_cap(info, call.input_tokens, call.max_tokens)
        return {**request, "model": target.model}

    async def _stream_into(self, task: CallTask[None], queue: ChunkQueue, call: CallRecord) -> None:
        """Put the chunks of a response into the queue.

        Once the outcome of the call is stored, the usage chunk or, after a failure, a problem is put into the queue.
        """
        outcome = call.new_outcome()
        redaction = StreamRedaction(
            self._redactor, lambda: attribute_response_text(call.by, outcome.target.provider.name)
        )
        unsent: list[Chunk] = []
        try:
            relaying = self._relay_into(queue, call, outcome, redaction, unsent)
            last = await self._settle_and_return(task, call, outcome, relaying)
        except Exception as problem:
            rest: list[Chunk | Exception | None] = [*unsent, *redaction.flush_held_back(), problem]
        else:
            cost = None if outcome.cost_micro_usd is None else outcome.cost_micro_usd / 1_000_000
            rest = [{**last, "corral": {"cost_usd": cost}}, None]
        for item in rest:
            await queue.put(item)

    async def _relay_into(
        self, queue: ChunkQueue, call: CallRecord, outcome: CallOutcome, redaction: StreamRedaction, unsent: list[Chunk]
    ) -> Chunk:
        """Put all chunks of a response except the last one into the queue, and return the last one.

        If this method is cancelled, the list `unsent` contains the chunk that was not yet put into the queue.
        """

        async def send(target: ModelTarget) -> tuple[ModelTarget, AsyncGenerator[Chunk, None], Chunk]:
            connection = await self._keys.connection_with_key(target.provider)
            request = self._request_for(call, target)
            opened = await self._breakers.guard(target.provider, lambda: open_stream(target, request, connection))
            return target, *opened

        target, iterator, first = await self._dispatcher.send_call(call, outcome, send)
        outcome.first_token_ms = _milliseconds_since(call.started)
        message = AssembledMessage() if self._payloads.stores_completed() else None
        last: Chunk = {}
        async with contextlib.aclosing(relay_stream(target, iterator, first, redaction, outcome)) as chunks:
            async for chunk in chunks:
                if chunk["choices"]:
                    if message is not None:
                        message.add_chunk(chunk)
                    unsent.append(chunk)
                    await queue.put(chunk)
                    unsent.clear()
                else:
                    last = chunk
        outcome.response = message.to_message() if message is not None else None
        return last

    async def _settle_and_return(
        self, task: CallTask[Any], call: CallRecord, outcome: CallOutcome, response: Coroutine[Any, Any, T]
    ) -> T:
        """Wait for the response, store the outcome of the call, and return the response.

        The outcome is stored even if the call fails. Raises only `Problem`.
        """
        try:
            async with self._cancel_on_timeout_or_lost_lease(call):
                result = await response
            outcome.status = "completed"
        except ProviderError as error:
            problem = problem_of(error, outcome.target.provider.name, self._redactor)
            outcome.credentials_refused = is_about_credentials(problem)
            outcome.fail(problem)
            raise problem from error
        except Exception as error:
            outcome.fail(error)
            raise
        finally:
            is_live = await self._settle_call(task, call, outcome)
        if not is_live:
            raise lease_lost_error()
        return result

    @contextlib.asynccontextmanager
    async def _cancel_on_timeout_or_lost_lease(self, call: CallRecord) -> AsyncGenerator[None, None]:
        """Cancel the `with` block when the caller's lease ends or the call takes too long.

        The time limit applies to the whole call, including retries and fallbacks.
        """
        seconds = self._settings.get(TOTAL_TIMEOUT_SECONDS)
        try:
            async with asyncio.timeout(seconds) as scope, self._leases.cancel_when_lost(call.by):
                yield
        except TimeoutError:
            if not scope.expired():
                raise
            raise Problem(f"The model did not respond within {seconds} seconds.", code="upstream_timeout") from None

    # -- the unit of work that settles a call

    async def _settle_call(self, task: CallTask[Any], call: CallRecord, outcome: CallOutcome) -> bool:
        """Store the outcome of a call. The asyncio task of the call cannot be cancelled until the outcome is stored.

        Return whether the caller's lease is still live.
        """
        outcome.duration_ms = _milliseconds_since(call.started)
        if outcome.finish_reason is not None:
            outcome.finish_reason = self._redactor.redact(outcome.finish_reason)[:MAX_FINISH_REASON]
        with task.protected():
            return await self._settle_with_retries(call, outcome)

    async def _settle_with_retries(self, call: CallRecord, outcome: CallOutcome) -> bool:
        """Store the outcome of the call, and retry if the database is unavailable.

        If the outcome cannot be stored, at least the cost of the call is recorded.
        """

        def settle() -> bool:
            return self._settlement.settle_call(call, outcome)

        try:
            for seconds in SETTLE_RETRY_SECONDS:
                with contextlib.suppress(Unavailable):
                    return await self._work(settle, entry=call.entry)
                await asyncio.sleep(seconds)
            return await self._work(settle, entry=call.entry)
        except Exception:
            log.exception("call not settled; charging it without details", extra={"call": call.id})
            await self._work(lambda: self._settlement.settle_without_details(call, outcome), entry=call.entry)
            raise


def _milliseconds_since(started: float) -> int:
    return round((time.monotonic() - started) * 1000)
