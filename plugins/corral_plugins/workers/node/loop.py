"""The agent loop: one attempt of one task, in a process of its own. It talks to the server with the attempt token.

The model is asked one step at a time; after each step a checkpoint is kept, so that the next attempt goes on where this
one ended. Between any two steps, and while the model speaks, the attempt can be cancelled, drained or lost.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from corral.schema.data import json_schema_problems
from corral_plugins.workers.node import messages as talk
from corral_plugins.workers.node.client import ApiError, Client, Cut, Unreachable, insist, is_final, pause
from corral_plugins.workers.node.endings import (
    CANCELLED,
    GIVE_BACK,
    LOST,
    REPORTED,
    CancelAsked,
    Ended,
    LeaseLost,
    heed,
    is_lost,
)
from corral_plugins.workers.node.live import LiveText
from corral_plugins.workers.node.model import Model, Question, Reply
from corral_plugins.workers.node.state import State, Wishes
from corral_plugins.workers.node.toolbox import Toolbox
from corral_plugins.workers.node.tools.workspace import Workspaces

MAX_STEPS, MAX_REPAIRS = 25, 2
MODEL_TRIES = 3
CUTS = 6
NEEDS_PEOPLE = ("credentials", "model", "not_configured")  # kinds of a refusal that no waiting ends
UNREADABLE = (
    "This worker cannot read the task's checkpoint, which another one wrote: {}. Let that one do the task, or retry it "
    "with from_checkpoint false, which begins it anew."
)


class AgentLoop:
    """Runs one claim to its end. `run` returns the exit status of the process."""

    def __init__(
        self,
        client: Client,
        claim: Mapping[str, Any],
        wishes: Wishes,
        *,
        allowed: Iterable[str] = (),
        workspaces: Workspaces | None = None,
    ) -> None:
        self._client, self._claim, self._wishes = client, claim, wishes
        self._task, self._agent = claim["task"], claim["agent"]
        self._id: str = self._task["id"]
        self._state = State(claim)
        self._model = Model(client, claim.get("gateway_url") or "/api/v1/llm")
        self._tools = Toolbox(client, claim, self._state, self._keep, allowed=allowed, workspaces=workspaces)
        self._workspaces = workspaces
        self._lines = 0

    async def run(self) -> int:
        """Until the attempt is reported, lost, or asked to be cancelled. Anything else that is raised is a crash."""
        try:
            await self._steps()
        except Ended:
            return REPORTED
        except LeaseLost:
            return LOST
        except CancelAsked:
            return CANCELLED
        except ApiError as error:
            if is_lost(error):
                return LOST
            raise
        raise AssertionError("the loop ends by reporting")

    async def _steps(self) -> None:
        state = self._state
        if state.fault is not None:  # to begin anew could do twice what was done before
            await self._fail("checkpoint_unreadable", UNREADABLE.format(state.fault), retryable=False)
        max_steps = int((self._agent.get("config") or {}).get("max_steps") or MAX_STEPS)
        while True:
            last = state.messages[-1]
            if last["role"] == "assistant" and not last.get("tool_calls"):
                await self._finish(last.get("content") or "")
            await self._drain()
            for call in talk.open_calls(state.messages):
                state.messages.append(await self._tool(call))
                await self._drain()
            if state.step >= max_steps:
                await self._fail("max_steps", f"The task was not done after {max_steps} model steps.", retryable=False)
            await self._step(max_steps)

    async def _step(self, max_steps: int) -> None:
        """Ask the model, keep its answer, tell how far it is."""
        state = self._state
        if "budget" in self._wishes and not state.warned:
            state.warned = True
            state.messages.append({"role": "user", "content": talk.FINISH})
        reply = await self._ask(state.step + 1)
        state.step += 1
        talk.name_calls(reply.message, state.messages, state.step)
        state.messages.append(reply.message)
        await self._keep()
        await self._log(f"Step {state.step}: {reply.model}, {reply.input_tokens} tokens in, {reply.output_tokens} out")
        progress: dict[str, Any] = {"message": f"Step {state.step} of at most {max_steps}"}
        if signature := talk.signature(reply.message.get("tool_calls") or ()):
            progress["signature"] = signature
        answer = await self._client.progress(self._id, progress)
        heed(answer)
        if answer.get("state") == "budget_warning":
            self._wishes.add("budget")

    # -- the model

    async def _ask(self, step: int) -> Reply:
        """The model's answer. The key is the same in every attempt, so a finished step costs nothing again."""
        key = f"{self._id}:{step}"
        for tries in range(1, MODEL_TRIES + 1):
            try:
                return await self._listen(key)
            except ApiError as error:
                if is_lost(error):
                    raise LeaseLost from None
                if error.code == "idempotency_key_reused":  # the conversation is another than in the earlier attempt
                    key = f"{self._id}:{step}:{self._claim['fence']}"
                elif _may_pass(error) and tries < MODEL_TRIES:
                    await asyncio.sleep(pause(tries + 1, error))
                else:
                    await self._refused(error)
        raise AssertionError("the last try returns or ends the attempt")

    async def _listen(self, key: str) -> Reply:
        """One answer, shown to people while it comes; asked for again while the server cannot be reached.

        One that breaks off is asked for again a few times: each may be paid.
        """
        config = self._agent.get("config") or {}
        question = Question(
            messages=self._state.messages,
            tools=self._tools.definitions,
            temperature=config.get("temperature"),
            max_tokens=config.get("max_tokens"),
        )

        cuts = 0

        async def once() -> Reply:
            nonlocal cuts
            async with LiveText(self._client, self._id) as live:
                try:
                    return await self._model.ask(question, key, live.add)
                except Cut as cut:
                    cuts += 1
                    if cuts < CUTS:
                        raise
                    detail = f"The answer broke off {cuts} times: {cut}"
                    raise ApiError(502, {"code": "provider_error", "detail": detail}) from None

        return await insist(once, unless=is_final)

    async def _refused(self, error: ApiError) -> None:
        """No answer from any model: give the task back where waiting helps, else fail."""
        own_cap = error.members.get("scope") == "task"
        if error.code in GIVE_BACK or (error.status == 402 and not own_cap):
            await self._release(error.code)
        kind = "budget_exceeded" if error.status == 402 else "provider_error"
        needs_people = error.members.get("kind") in NEEDS_PEOPLE or error.status in (402, 403, 422)
        await self._fail(kind, error.detail, retryable=not needs_people)

    # -- tools

    async def _tool(self, call: Mapping[str, Any]) -> talk.Message:
        try:
            return await self._tools.call(call)
        except ApiError as error:
            if error.code in GIVE_BACK:
                await self._release(error.code)
            raise

    # -- endings

    async def _finish(self, text: str) -> None:
        """Report the answer; or, when it does not match the schema, ask for it again."""
        schema = self._task.get("output_schema")
        if not schema:
            await self._complete({"text": text})
        try:
            value = talk.parse_json(text)
            problems = [
                f"{fault.pointer or '(the whole)'}: {fault.detail}" for fault in json_schema_problems(schema, value)
            ]
        except ValueError as error:
            value, problems = None, [str(error)]
        if not problems:
            await self._complete(value)
        if self._state.repairs >= MAX_REPAIRS:
            await self._fail("schema_mismatch", "; ".join(problems), retryable=True)
        self._state.repairs += 1
        self._state.messages.append(talk.repair(problems))

    async def _complete(self, result: Any) -> None:
        try:
            await self._client.complete(self._id, result)
        except ApiError as error:
            if is_lost(error):
                raise LeaseLost from None
            await self._fail("result_refused", error.detail, retryable=False)
        if self._workspaces is not None:
            self._workspaces.remove(self._id)
        raise Ended

    async def _fail(self, kind: str, message: str, *, retryable: bool) -> None:
        await self._client.fail(self._id, kind, message, retryable=retryable)
        raise Ended

    async def _release(self, reason: str) -> None:
        await self._client.release(self._id, reason)
        raise Ended

    async def _drain(self) -> None:
        if "drain" in self._wishes:
            await self._keep()
            await self._release("drain")

    async def _keep(self) -> None:
        """Store a checkpoint; one that is too large is left out, and the next attempt begins further back."""
        try:
            await self._client.checkpoint(self._id, self._state.step, self._state.kept())
        except ApiError as error:
            if error.status not in (413, 422):
                raise
            await self._log(f"No checkpoint after step {self._state.step}: {error.detail}")

    async def _log(self, message: str) -> None:
        """A line for people; losing one loses nothing."""
        self._lines += 1
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        try:
            await self._client.logs(self._id, [{"seq": self._lines, "ts": now, "level": "info", "message": message}])
        except (ApiError, Unreachable) as error:
            if isinstance(error, ApiError) and is_lost(error):
                raise LeaseLost from None


def _may_pass(error: ApiError) -> bool:
    """Whether the same call may be answered in a moment."""
    permanent = error.code in GIVE_BACK or error.members.get("kind") in NEEDS_PEOPLE
    return error.status in (429, 503) and not permanent
