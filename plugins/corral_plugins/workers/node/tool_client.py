"""Tool calls of the model: each is sent to the server, which runs it, permits this worker to run it, or denies it.

Before a tool that is not idempotent runs here, a checkpoint says so. An attempt that resumes from such a checkpoint
does not run the tool again, but tells the model that the outcome is unknown.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

from corral_plugins.workers.node.client import RELEASE_CODES, ApiError, Client, LeaseLost
from corral_plugins.workers.node.conversation import AttemptState, Message, parse_json, tool_content, tool_message
from corral_plugins.workers.node.tools.builtin import TOOLS, BuiltinTool
from corral_plugins.workers.node.tools.workspace import ToolFailed, Workspaces

NAME_LIMIT = 64
UNKNOWN = {
    "type": "outcome_unknown",
    "message": "The worker ended during this call. Whether it had an effect is unknown: check before you repeat it.",
}


class Waiting(Exception):
    """The task waits for a person; its lease has been released."""


class ToolClient:
    """Calls the tools of one attempt. `allowed`: the tools of this machine that agents may use."""

    def __init__(
        self,
        client: Client,
        claim: Mapping[str, Any],
        state: AttemptState,
        checkpoint: Callable[[], Awaitable[None]],
        *,
        allowed: Iterable[str] = (),
        workspaces: Workspaces | None = None,
    ) -> None:
        self._client, self._state, self._checkpoint, self._workspaces = client, state, checkpoint, workspaces
        self._task_id: str = claim["task"]["id"]
        offered = claim["agent"].get("tools") or ()
        self._names = {_model_name(tool["name"]): tool["name"] for tool in offered}
        self._local = {name: TOOLS[name] for name in allowed} if workspaces is not None else {}
        self.definitions = [_definition(tool) for tool in offered]
        """The tools for the model, under names that it accepts."""

    async def call(self, call: Mapping[str, Any]) -> Message:
        """Make a call and return its result for the model, which may be an error.

        Raises `LeaseLost`, `Waiting`, and `ApiError` if the task should be released.
        """
        name = self._names.get(call["function"]["name"], call["function"]["name"])
        try:
            arguments = parse_json(call["function"]["arguments"] or "{}")
        except ValueError as error:
            return tool_message(call["id"], {"error": f"The arguments are not valid: {error}"})
        try:
            reply = self._state.permits.pop(call["id"], None) or await self._ask(name, call["id"], arguments)
            return await self._handle(name, call["id"], arguments, reply)
        except ApiError as error:
            if error.is_lease_lost:
                raise LeaseLost from None
            if error.code in RELEASE_CODES:
                raise
            faults = [f"{fault.get('pointer')}: {fault.get('detail')}" for fault in error.members.get("errors") or ()]
            return tool_message(call["id"], {"error": " ".join([f"{name}: {error.detail}", *faults])})

    async def _ask(self, name: str, call_id: str, arguments: Any) -> Mapping[str, Any]:
        """Send the call to the server. If an earlier attempt left it running, wait for its outcome."""
        try:
            return await self._client.tool(self._task_id, name, call_id, arguments)
        except ApiError as error:
            if error.code != "invalid_state":
                raise
        while True:
            reply = await self._client.tool_outcome(self._task_id, call_id)
            if reply.get("status") != "running":
                return reply

    async def _handle(self, name: str, call_id: str, arguments: Any, reply: Mapping[str, Any]) -> Message:
        if reply.get("status") == "running":  # the tool waits for a person; the next claim has its result
            raise Waiting
        if reply.get("status") == "pending_approval":
            checkpoint = {"step": self._state.step, "state": self._state.checkpoint()}
            await self._client.wait(self._task_id, {"approval_id": reply["approval_id"], "checkpoint": checkpoint})
            raise Waiting
        if reply.get("permit"):
            approved = reply.get("arguments")  # the person who approved it may have changed them
            return await self._permitted(name, call_id, arguments if approved is None else approved, reply["permit"])
        return tool_message(call_id, tool_content(reply))

    async def _permitted(self, name: str, call_id: str, arguments: Any, permit: str) -> Message:
        """Run a tool here and report its outcome."""
        began = time.monotonic()
        outcome = await self._run(name, call_id, arguments)
        outcome["duration_ms"] = round((time.monotonic() - began) * 1000)
        try:
            await self._client.tool_result(self._task_id, call_id, {"permit": permit, **outcome})
        except ApiError as error:  # too late for the record, but the tool has run
            if error.is_lease_lost:
                raise
        self._state.running = None
        return tool_message(call_id, tool_content(outcome))

    async def _run(self, name: str, call_id: str, arguments: Any) -> dict[str, Any]:
        tool = self._local.get(name)
        if tool is None or self._workspaces is None:
            return {"error": {"type": "not_offered", "message": f"This worker does not offer {name}."}}
        if not await self._begin(tool, call_id):
            return {"error": UNKNOWN}
        try:
            return {"result": await tool.parse(arguments).run(self._workspaces.open(self._task_id))}
        except (ToolFailed, OSError, ValueError) as error:
            return {"error": {"type": "failed", "message": str(error)}}

    async def _begin(self, tool: type[BuiltinTool], call_id: str) -> bool:
        """Record in a checkpoint that the tool begins. False: it began before, and must not run twice."""
        if tool.idempotent:
            return True
        if self._state.running == call_id:
            return False
        self._state.running = call_id
        await self._checkpoint()
        return True


def _model_name(name: str) -> str:
    """The tool's name for the model. Models accept at most 64 letters, digits, `_` and `-`; tool names have dots."""
    plain = name.replace(".", "__")
    if len(plain) <= NAME_LIMIT:
        return plain
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{plain[: NAME_LIMIT - len(digest) - 1]}_{digest}"


def _definition(tool: Mapping[str, Any]) -> dict[str, Any]:
    schema = tool.get("schema") or {}
    description = tool.get("description") or schema.get("description")
    return {"name": _model_name(tool["name"]), "description": description, "schema": schema}
