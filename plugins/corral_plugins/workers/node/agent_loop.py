"""The agent loop, which runs one attempt of one task in a separate process with the attempt token.

The loop calls the model once per step. After each step, it stores a checkpoint from which the next attempt can resume.
Between steps, and while the model responds, the attempt can be cancelled, be asked to stop, or lose its lease.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, NoReturn

from corral.schema.json_schema_validation import json_schema_errors
from corral_plugins.workers.node.attempt import Attempt
from corral_plugins.workers.node.client import (
    RELEASE_CODES,
    ApiError,
    IncompleteResponse,
    ServerUnreachable,
    WorkerApiClient,
    WorkerLeaseLost,
    call_with_retries,
    is_final_response,
    raise_for_lease_state,
    retry_delay,
)
from corral_plugins.workers.node.conversation import (
    FINISH,
    Message,
    assign_call_ids,
    calls_signature,
    open_calls,
    output_schema,
    parse_json,
    repair_message,
)
from corral_plugins.workers.node.gateway_model import GatewayModel, ModelCall, ModelReply

MAX_STEPS, MAX_REPAIRS = 25, 2
MODEL_TRIES, MAX_CUTS = 3, 6
LIVE_SECONDS = 0.5
CUT = "… "
LIVE_LENGTH = 500  # in characters: the maximum length of a progress message
LONGEST_WORD = 40  # in characters: text without any spaces is longer
NEEDS_PEOPLE = ("credentials", "model")  # kinds of errors that only a person can resolve
GATEWAY_AWAY = ("plugin_disabled", "plugin_failed")  # codes of the server while the gateway is out of service


class AgentLoop(Attempt):
    """Runs the attempt of one claim with a model."""

    def __init__(self, client: WorkerApiClient, claim: Mapping[str, Any], controls: set[str], **options: Any) -> None:
        super().__init__(client, claim, controls, **options)
        self._model = GatewayModel(client, claim.get("gateway_url") or "/api/v1/llm")

    async def _run_steps(self) -> NoReturn:
        state = self._state
        max_steps = int((self._agent.get("config") or {}).get("max_steps") or MAX_STEPS)
        while True:
            last = state.messages[-1]
            if last["role"] == "assistant" and not last.get("tool_calls"):
                await self._finish_with_answer(last.get("content") or "")
            await self._release_for_drain()
            for call in open_calls(state.messages):
                state.messages.append(await self._call_tool(call))
                await self._release_for_drain()
            if state.step >= max_steps:
                await self._fail_attempt(
                    "max_steps", f"The task was not finished after {max_steps} model steps.", retryable=False
                )
            await self._run_model_step(max_steps)

    async def _run_model_step(self, max_steps: int) -> None:
        """Call the model, store a checkpoint and report progress."""
        state = self._state
        if "budget" in self._controls and not state.warned:
            state.warned = True
            state.messages.append({"role": "user", "content": FINISH})
        state.messages += state.unread
        state.unread = []
        reply = await self._ask_model(state.step + 1)
        state.step += 1
        assign_call_ids(reply.message, state.messages, state.step)
        state.messages.append(reply.message)
        await self._store_checkpoint()
        await self._append_log(
            f"Step {state.step}: {reply.model}, {reply.input_tokens} tokens in, {reply.output_tokens} out"
        )
        progress: dict[str, Any] = {"message": f"Step {state.step} of at most {max_steps}"}
        if calls := calls_signature(reply.message.get("tool_calls") or ()):
            progress["signature"] = calls
        updated = await self._client.report_progress(self._id, progress)
        raise_for_lease_state(updated)
        if updated.get("state") == "budget_warning":
            self._controls.add("budget")

    # -- the model

    async def _ask_model(self, step: int) -> ModelReply:
        """Call the model for a step and return the reply.

        The idempotency key is the same in every attempt, so that repeating a finished step incurs no cost. If the
        conversation differs from that of the earlier attempt, the step is requested again with a new key.
        """
        key = f"{self._id}:{step}"
        for tries in range(1, MODEL_TRIES + 1):
            try:
                return await self._stream_reply(key)
            except ApiError as error:
                if error.is_lease_lost:
                    raise WorkerLeaseLost from None
                if error.code == "idempotency_key_reused":  # the conversation differs from that of an earlier attempt
                    key = f"{self._id}:{step}:{self._claim['fence']}"
                elif _is_temporary(error) and tries < MODEL_TRIES:
                    await asyncio.sleep(_pause_before_retry(tries, error))
                else:
                    await self._handle_model_error(error)
        raise AssertionError("the last try neither returned a reply nor ended the attempt")

    async def _stream_reply(self, key: str) -> ModelReply:
        """Request one reply, and report its text as progress while the text arrives.

        The request is repeated while the server cannot be reached. After `MAX_CUTS` (6) incomplete replies, the request
        fails, because each request may be billed.
        """
        config = self._agent.get("config") or {}
        request = ModelCall(
            messages=self._state.messages,
            tools=self._tools.definitions,
            temperature=config.get("temperature"),
        )
        cuts = 0

        async def send_call() -> ModelReply:
            nonlocal cuts
            async with LiveOutput(self._client, self._id) as live:
                try:
                    return await self._model.send_request(request, key, live.add_text)
                except IncompleteResponse as cut:
                    cuts += 1
                    if cuts < MAX_CUTS:
                        raise
                    detail = f"The model's reply was incomplete {cuts} times: {cut}"
                    raise ApiError(502, {"code": "provider_error", "detail": detail}) from None

        return await call_with_retries(send_call, unless=is_final_response)

    async def _handle_model_error(self, error: ApiError) -> None:
        """Handle an error from the model call: release the task if waiting may help, otherwise fail the attempt."""
        own_cap = error.members.get("scope") == "task"
        if error.code in RELEASE_CODES or (error.status == 402 and not own_cap):
            await self._release_blocked_task(error)
        kind = "budget_exceeded" if error.status == 402 else "provider_error"
        if error.code in GATEWAY_AWAY:
            kind = error.code
        needs_people = error.members.get("kind") in NEEDS_PEOPLE or error.status in (400, 402, 403, 404, 422)
        await self._fail_attempt(kind, error.detail, retryable=not needs_people)

    # -- tools

    async def _call_tool(self, call: Mapping[str, Any]) -> Message:
        try:
            return await self._tools.call_tool(call)
        except ApiError as error:
            if error.code in RELEASE_CODES:
                await self._release_blocked_task(error)
            raise

    # -- ending the attempt

    async def _finish_with_answer(self, text: str) -> None:
        """Complete the task with the model's answer.

        If the answer does not match the output schema, ask for the answer again, at most `MAX_REPAIRS` (2) times.
        """
        schema = output_schema(self._claim)
        if not schema:
            await self._complete_task({"text": text})
        try:
            value = parse_json(text, "answer")
            problems = [
                f"{fault.pointer or '(the whole value)'}: {fault.detail}" for fault in json_schema_errors(schema, value)
            ]
        except ValueError as error:
            value, problems = None, [str(error)]
        if not problems:
            await self._complete_task(value)
        if self._state.repairs >= MAX_REPAIRS:
            message = f"The model's answer does not match output_schema: {'; '.join(problems)}"
            await self._fail_attempt("schema_mismatch", message, retryable=True)
        self._state.repairs += 1
        self._state.messages.append(repair_message(problems))


def _is_temporary(error: ApiError) -> bool:
    """Return whether repeating the model call soon is likely to succeed."""
    permanent = error.code in RELEASE_CODES or error.members.get("kind") in NEEDS_PEOPLE
    return error.status in (429, 503) and not permanent


def _pause_before_retry(tries: int, error: ApiError) -> float:
    """Return the number of seconds to wait before the model call is repeated.

    A gateway that is out of service usually needs an admin, so the `Retry-After` of 60 s is not waited for: the retry
    policy of the task decides how long to go on. Waits of about 4 s and 8 s outlast a reload of the server, and an
    admin who disables the gateway and enables it again.
    """
    return retry_delay(tries + 3) if error.code in GATEWAY_AWAY else retry_delay(tries + 1, error)


class LiveOutput:
    """Shows the text of a model's reply while it arrives, in at most two progress reports per second.

    Each report contains at most the last 500 characters of the text, without a last word that may be incomplete. If the
    beginning of the text is left out, the report begins with "… " and a whole word. If the response to a report says
    that the lease has ended or that the task is being cancelled, `add_text` and the end of the `async with` block raise
    `WorkerLeaseLost` or `CancelRequested`.
    """

    def __init__(self, client: WorkerApiClient, task_id: str) -> None:
        self._client, self._task_id = client, task_id
        self._tail = ""
        self._due = time.monotonic() + LIVE_SECONDS
        self._sending: asyncio.Task[dict[str, Any]] | None = None

    def add_text(self, text: str) -> None:
        """Add text to the output, and start a progress report if one is due, without waiting for the response."""
        self._tail = _end_of(self._tail + text)
        if self._sending is not None and self._sending.done():
            _raise_for_report(self._sending)
            self._sending = None
        if self._sending is None and time.monotonic() >= self._due and (words := _whole_words(self._tail)):
            self._due = time.monotonic() + LIVE_SECONDS
            call = self._client.report_progress(self._task_id, {"message": words}, tries=1)
            self._sending = asyncio.ensure_future(call)

    async def __aenter__(self) -> LiveOutput:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait until the current progress report has been sent, so that it arrives before any later report."""
        if self._sending is None:
            return
        if error is not None:
            self._sending.cancel()
        await asyncio.wait({self._sending})
        if error is None:
            _raise_for_report(self._sending)


def _end_of(text: str) -> str:
    """Return a short text unchanged, and otherwise "… " and the end of the text, which begins with a whole word.

    A first word longer than `LONGEST_WORD` is kept, because it is probably text without spaces.
    """
    if len(text) <= LIVE_LENGTH:
        return text
    start = len(text) - LIVE_LENGTH + len(CUT)
    end = text[start:]
    first = "" if text[start - 1].isspace() or end[0].isspace() else end.split(maxsplit=1)[0]
    return CUT + (end if len(first) > LONGEST_WORD else end.removeprefix(first)).lstrip()


def _whole_words(text: str) -> str:
    """Return the text without its last word, which may be incomplete, or "" if nothing else is left.

    A last word longer than `LONGEST_WORD` is kept, because it is probably text without spaces.
    """
    last = (text.split() or [""])[-1]
    whole = text if len(last) > LONGEST_WORD else text.removesuffix(last)
    return whole if whole.strip() else ""


def _raise_for_report(sending: asyncio.Task[dict[str, Any]]) -> None:
    """Raise `WorkerLeaseLost` or `CancelRequested` if required by the response to a progress report.

    A progress report that could not be delivered is ignored.
    """
    try:
        raise_for_lease_state(sending.result())
    except ServerUnreachable:
        return
    except ApiError as error:
        if error.is_lease_lost:
            raise WorkerLeaseLost from None
