"""Tool calls of the model: every one is asked of the server, which runs it, permits it here, or says no.

A call that began here and was cut is not begun again unless repeating it does no harm: that it begins is kept in a
checkpoint before it does, and whoever finds that there tells the model that nobody knows how it went.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

from corral_plugins.workers.node import messages as talk
from corral_plugins.workers.node.client import ApiError, Client
from corral_plugins.workers.node.endings import GIVE_BACK, Ended, LeaseLost, is_lost
from corral_plugins.workers.node.state import State
from corral_plugins.workers.node.tools.table import TOOLS, WorkerTool
from corral_plugins.workers.node.tools.workspace import ToolFailed, Workspaces

WIRE_NAME_LIMIT = 64
UNKNOWN = {
    "type": "outcome_unknown",
    "message": "The worker ended while this ran. Whether it did anything is not known: look before you repeat it.",
}


class Toolbox:
    """The tools of one attempt. `allowed`: those that this worker lets agents use here; `keep` stores a checkpoint."""

    def __init__(
        self,
        client: Client,
        claim: Mapping[str, Any],
        state: State,
        keep: Callable[[], Awaitable[None]],
        *,
        allowed: Iterable[str] = (),
        workspaces: Workspaces | None = None,
    ) -> None:
        self._client, self._state, self._keep, self._workspaces = client, state, keep, workspaces
        self._task_id: str = claim["task"]["id"]
        offered = claim["agent"].get("tools") or ()
        self._names = {_wire_name(tool["name"]): tool["name"] for tool in offered}
        self._here = {name: TOOLS[name] for name in allowed} if workspaces is not None else {}
        self.definitions = [_definition(tool) for tool in offered]
        """For the model, with the names of the wire."""

    async def call(self, call: Mapping[str, Any]) -> talk.Message:
        """One call; what refuses it is what the model is told. Raises `LeaseLost`, and `Ended` when the task waits."""
        name = self._names.get(call["function"]["name"], call["function"]["name"])
        try:
            arguments = talk.parse_json(call["function"]["arguments"] or "{}")
        except ValueError as error:
            return talk.tool_result(call["id"], {"error": f"The arguments: {error}"})
        try:
            answer = self._state.permits.pop(call["id"], None) or await self._ask(name, call["id"], arguments)
            return await self._answered(name, call["id"], arguments, answer)
        except ApiError as error:
            if is_lost(error):
                raise LeaseLost from None
            if error.code in GIVE_BACK:
                raise
            faults = [f"{fault.get('pointer')}: {fault.get('detail')}" for fault in error.members.get("errors") or ()]
            return talk.tool_result(call["id"], {"error": " ".join([f"{name}: {error.detail}", *faults])})

    async def _ask(self, name: str, call_id: str, arguments: Any) -> Mapping[str, Any]:
        """The server's answer; of a call that an earlier attempt left running, its outcome."""
        try:
            return await self._client.tool(self._task_id, name, call_id, arguments)
        except ApiError as error:
            if error.code != "invalid_state":
                raise
        while True:
            answer = await self._client.tool_outcome(self._task_id, call_id)
            if answer.get("status") != "running":
                return answer

    async def _answered(self, name: str, call_id: str, arguments: Any, answer: Mapping[str, Any]) -> talk.Message:
        if answer.get("status") == "running":  # the tool asks a person: the task waits, and its next claim knows
            raise Ended
        if answer.get("status") == "pending_approval":
            kept = {"step": self._state.step, "state": self._state.kept()}
            await self._client.wait(self._task_id, {"approval_id": answer["approval_id"], "checkpoint": kept})
            raise Ended
        if answer.get("permit"):
            approved = answer.get("arguments")  # a person may have changed them
            return await self._permitted(name, call_id, arguments if approved is None else approved, answer["permit"])
        return talk.tool_result(call_id, talk.outcome(answer))

    async def _permitted(self, name: str, call_id: str, arguments: Any, permit: str) -> talk.Message:
        """Run it here and tell the server how it went."""
        began = time.monotonic()
        told = await self._run(name, call_id, arguments)
        told["duration_ms"] = round((time.monotonic() - began) * 1000)
        try:
            await self._client.tool_result(self._task_id, call_id, {"permit": permit, **told})
        except ApiError as error:  # too late for the record; what happened has happened all the same
            if is_lost(error):
                raise
        self._state.running = None
        return talk.tool_result(call_id, talk.outcome(told))

    async def _run(self, name: str, call_id: str, arguments: Any) -> dict[str, Any]:
        tool = self._here.get(name)
        if tool is None or self._workspaces is None:
            return {"error": {"type": "not_offered", "message": f"This worker does not offer {name}."}}
        if not await self._may_begin(tool, call_id):
            return {"error": UNKNOWN}
        try:
            return {"result": await tool.call(self._workspaces.open(self._task_id), arguments)}
        except (ToolFailed, OSError, ValueError) as error:
            return {"error": {"type": "failed", "message": str(error)}}

    async def _may_begin(self, tool: WorkerTool, call_id: str) -> bool:
        """Keep that it begins; False: it has begun before, and may not twice."""
        if tool.repeatable:
            return True
        if self._state.running == call_id:
            return False
        self._state.running = call_id
        await self._keep()
        return True


def _wire_name(name: str) -> str:
    """Models take 64 letters, digits, `_` and `-` in names of functions; tools have dots."""
    plain = name.replace(".", "__")
    if len(plain) <= WIRE_NAME_LIMIT:
        return plain
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{plain[: WIRE_NAME_LIMIT - len(digest) - 1]}_{digest}"


def _definition(tool: Mapping[str, Any]) -> dict[str, Any]:
    schema = tool.get("schema") or {}
    description = tool.get("description") or schema.get("description")
    return {"name": _wire_name(tool["name"]), "description": description, "schema": schema}
