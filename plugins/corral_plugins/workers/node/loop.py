"""The agent loop: one attempt of one task, in a process of its own. It talks to the server with the attempt token.

The model is asked one step at a time; after each step a checkpoint is kept, so that the next attempt goes on where this
one ended. Between any two steps the attempt can be cancelled, drained or lost.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from corral.schema.data import json_schema_problems
from corral_plugins.workers.node import messages as talk
from corral_plugins.workers.node.client import ApiError, Client, Unreachable, pause
from corral_plugins.workers.node.state import State, Wishes

# Exit statuses of the process; any other is a crash.
REPORTED, LOST, CANCELLED = 0, 10, 11
MAX_STEPS, MAX_REPAIRS = 25, 2
MODEL_TRIES = 3
GIVE_BACK = ("circuit_open", "kill_switch")  # waiting helps, and costs no attempt
TOOL_TEXT_LIMIT = 64 * 1024


class LeaseLost(Exception):
    """Somebody else has the task, or nobody may: stop and report nothing."""


class CancelAsked(Exception):
    """The task is to be cancelled: stop; the worker acknowledges."""


class Ended(Exception):
    """The attempt has been reported."""


class AgentLoop:
    """Runs one claim to its end. `run` returns the exit status of the process."""

    def __init__(self, client: Client, claim: Mapping[str, Any], wishes: Wishes) -> None:
        self._client, self._claim, self._wishes = client, claim, wishes
        self._task, self._agent = claim["task"], claim["agent"]
        self._id: str = self._task["id"]
        self._names = {_wire_name(tool["name"]): tool["name"] for tool in self._agent.get("tools") or ()}
        self._state = State(claim)
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
            if _is_lost(error):
                return LOST
            raise
        raise AssertionError("the loop ends by reporting")

    async def _steps(self) -> None:
        state = self._state
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
            await self._model(max_steps)

    # -- one model step

    async def _model(self, max_steps: int) -> None:
        state = self._state
        if "budget" in self._wishes and not state.warned:
            state.warned = True
            state.messages.append({"role": "user", "content": talk.FINISH})
        answer = await self._ask(state.step + 1)
        message = answer["choices"][0]["message"]
        said: talk.Message = {"role": "assistant", "content": message.get("content")}
        if message.get("tool_calls"):
            said["tool_calls"] = message["tool_calls"]
        state.messages.append(said)
        state.step += 1
        await self._keep()
        usage = answer.get("usage") or {}
        await self._log(
            f"Step {state.step}: {answer.get('model', 'model')}, {usage.get('prompt_tokens', 0)} tokens in, "
            f"{usage.get('completion_tokens', 0)} out"
        )
        progress: dict[str, Any] = {"message": f"Step {state.step} of at most {max_steps}"}
        if signature := talk.signature(said.get("tool_calls") or ()):
            progress["signature"] = signature
        _heed(await self._client.progress(self._id, progress))

    async def _ask(self, step: int) -> dict[str, Any]:
        """The model's answer. The key is the same in every attempt, so a finished step costs nothing again."""
        key = f"{self._id}:{step}"
        for tries in range(1, MODEL_TRIES + 1):
            try:
                return await self._client.chat(self._request(), key)
            except ApiError as error:
                if _is_lost(error):
                    raise LeaseLost from None
                if error.code == "idempotency_key_reused":  # the conversation is another than in the earlier attempt
                    key = f"{self._id}:{step}:{self._claim['fence']}"
                elif error.status in (429, 503) and error.code not in GIVE_BACK and tries < MODEL_TRIES:
                    await asyncio.sleep(pause(tries + 1, error))
                else:
                    await self._refused(error)
        raise AssertionError("the last try returns or ends the attempt")

    async def _refused(self, error: ApiError) -> None:
        """No answer from any model: give the task back where waiting helps, else fail."""
        own_cap = error.members.get("scope") == "task"
        if error.code in GIVE_BACK or (error.status == 402 and not own_cap):
            await self._release(error.code)
        kind = "budget_exceeded" if error.status == 402 else "provider_error"
        cure = error.members.get("kind") in ("credentials", "model") or error.status in (402, 403, 422)
        await self._fail(kind, error.detail, retryable=not cure)

    def _request(self) -> dict[str, Any]:
        config = self._agent.get("config") or {}
        request: dict[str, Any] = {"model": "agent", "messages": self._state.messages}
        for name in ("temperature", "max_tokens"):
            if config.get(name) is not None:
                request[name] = config[name]
        if tools := self._agent.get("tools"):
            request["tools"] = [_function(tool) for tool in tools]
        return request

    # -- tools

    async def _tool(self, call: Mapping[str, Any]) -> talk.Message:
        """One tool call; what refuses it is what the model is told."""
        name = self._names.get(call["function"]["name"], call["function"]["name"])
        try:
            arguments = json.loads(call["function"]["arguments"] or "{}")
        except ValueError:
            return talk.tool_result(call["id"], {"error": "The arguments are not JSON."})
        try:
            answer = await self._client.tool(self._id, name, call["id"], arguments)
        except ApiError as error:
            if _is_lost(error):
                raise LeaseLost from None
            return talk.tool_result(call["id"], {"error": f"{name}: {error.detail}"})
        return await self._tool_answer(name, call["id"], answer)

    async def _tool_answer(self, name: str, call_id: str, answer: Mapping[str, Any]) -> talk.Message:
        status = answer.get("status")
        if status == "pending_approval":
            kept = {"step": self._state.step, "state": self._state.kept()}
            await self._client.wait(self._id, {"approval_id": answer["approval_id"], "checkpoint": kept})
            raise Ended
        if status == "permitted":
            error = f"This worker does not offer {name}."
            await self._client.tool_result(self._id, call_id, {"permit": answer["permit"], "error": error})
            return talk.tool_result(call_id, {"error": error})
        value = answer.get("result") if answer.get("error") is None else {"error": answer["error"]}
        message = talk.tool_result(call_id, value)
        message["content"] = message["content"][:TOOL_TEXT_LIMIT]
        return message

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
            value, problems = None, [f"not JSON: {error}"]
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
            if _is_lost(error):
                raise LeaseLost from None
            await self._fail("result_refused", error.detail, retryable=False)
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
            if isinstance(error, ApiError) and _is_lost(error):
                raise LeaseLost from None


def _heed(answer: Mapping[str, Any]) -> None:
    """Every answer to a lease call may say that it is over."""
    if answer.get("state") == "lost":
        raise LeaseLost
    if answer.get("state") == "cancel_requested":
        raise CancelAsked


def _is_lost(error: ApiError) -> bool:
    """The token dies with its lease, and a deleted task is nobody's."""
    return error.code in ("lease_lost", "task_terminal") or error.status == 401


def _wire_name(name: str) -> str:
    """Models take letters, digits, `_` and `-` in names of functions; tools have dots."""
    return name.replace(".", "__")


def _function(tool: Mapping[str, Any]) -> dict[str, Any]:
    function: dict[str, Any] = {"name": _wire_name(tool["name"])}
    if tool.get("description"):
        function["description"] = tool["description"]
    function["parameters"] = tool.get("schema") or {"type": "object"}
    return {"type": "function", "function": function}
