"""The client that lets the agent loop call tools on the server or, if the server permits it, on this machine.

Each call is sent to the server. The server runs the tool, permits this worker to run the tool, or denies the call.
Before this worker runs a tool that is not idempotent, it stores a checkpoint that records the call. An attempt that
resumes from such a checkpoint does not run the tool again, but tells the model that the outcome is unknown.
"""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

from corral_plugins.workers.node.client import RELEASE_CODES, ApiError, WorkerApiClient, WorkerLeaseLost
from corral_plugins.workers.node.conversation import AttemptState, Message, parse_json, tool_content, tool_message
from corral_plugins.workers.node.tools.builtin import MAX_SECONDS, TOOLS
from corral_plugins.workers.node.tools.mcp import McpToolbox
from corral_plugins.workers.node.tools.workspace import ToolFailed, Workspaces

NAME_LIMIT = 64
UNKNOWN = {
    "type": "outcome_unknown",
    "message": "The worker stopped during this call. It is unknown whether the call had an effect; check before "
    "you repeat it.",
}


class TaskWaitsForPerson(Exception):
    """Raised to end the attempt because the task waits for a person. The lease has already been released."""


class ToolClient:
    """The client for the tool calls of one attempt.

    `allowed` lists the tools that agents may use on this machine, and `mcp` calls the tools of MCP servers.
    """

    def __init__(
        self,
        client: WorkerApiClient,
        claim: Mapping[str, Any],
        state: AttemptState,
        checkpoint: Callable[[], Awaitable[None]],
        *,
        allowed: Iterable[str] = (),
        workspaces: Workspaces | None = None,
        mcp: McpToolbox | None = None,
    ) -> None:
        self._client, self._state, self._checkpoint, self._workspaces = client, state, checkpoint, workspaces
        self._task_id: str = claim["task"]["id"]
        self._mcp = mcp
        offered = claim["agent"].get("tools") or ()
        self._names = {_model_name(tool["name"]): tool["name"] for tool in offered}
        self._local = {name: TOOLS[name] for name in allowed} if workspaces is not None else {}
        self.definitions = [_tool_definition(tool) for tool in offered]
        """The tools for the model, with names that models accept."""

    async def call_tool(self, call: Mapping[str, Any]) -> Message:
        """Make a tool call, and return the message for the model with the result or the error.

        Raise `WorkerLeaseLost` or `TaskWaitsForPerson` if the attempt must end. Raise `ApiError` if the task should be
        released.
        """
        named = call["function"]["name"]
        name = self._names.get(named) or named.replace("__", ".")  # models also call tools that were not offered
        try:
            arguments = parse_json(call["function"]["arguments"] or "{}", "text")
        except ValueError as error:
            return tool_message(call["id"], {"error": f"The arguments are not valid: {error}"})
        try:
            return tool_message(call["id"], tool_content(await self.run_call(name, call["id"], arguments)))
        except ApiError as error:
            if error.is_lease_lost:
                raise WorkerLeaseLost from None
            if error.code in RELEASE_CODES:
                raise
            faults = [f"{fault.get('pointer')}: {fault.get('detail')}" for fault in error.members.get("errors") or ()]
            return tool_message(call["id"], {"error": " ".join([f"{name}: {error.detail}", *faults])})

    async def run_call(self, name: str, call_id: str, arguments: Any) -> Mapping[str, Any]:
        """Make a tool call and return its outcome, which contains a `result` or an `error`.

        Raise `TaskWaitsForPerson` if the attempt must end, and `ApiError` if the server refuses the call.
        """
        reply = await self._send_call(name, call_id, arguments)
        if reply.get("status") == "running":  # the tool waits for a person; the next claim contains the result
            raise TaskWaitsForPerson
        if reply.get("status") == "pending_approval":
            checkpoint = {"step": self._state.step, "state": self._state.to_checkpoint()}
            await self._client.wait_for_person(
                self._task_id, {"approval_id": reply["approval_id"], "checkpoint": checkpoint}
            )
            raise TaskWaitsForPerson
        if reply.get("permit"):
            arguments = reply.get("approved_arguments", arguments)  # an approver may have changed them
            return await self._run_permitted(name, call_id, arguments, reply)
        return reply

    async def _send_call(self, name: str, call_id: str, arguments: Any) -> Mapping[str, Any]:
        """Send the call to the server.

        If an earlier attempt made the same call and the call is still running, wait for its outcome.
        """
        try:
            return await self._client.call_tool(self._task_id, name, call_id, arguments)
        except ApiError as error:
            if error.code != "invalid_state":
                raise
        while True:
            reply = await self._client.get_tool_call(self._task_id, call_id)
            if reply.get("status") != "running":
                return reply

    async def _run_permitted(
        self, name: str, call_id: str, arguments: Any, reply: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        """Run a tool on this machine with the server's permission. Report the outcome to the server, and return it."""
        began = time.monotonic()
        limit = float(reply.get("timeout_seconds") or MAX_SECONDS)
        outcome = await self._run_local_tool(name, call_id, arguments, limit)
        outcome["duration_ms"] = round((time.monotonic() - began) * 1000)
        try:
            await self._client.report_tool_result(self._task_id, call_id, {"permit": reply["permit"], **outcome})
        except ApiError as error:  # the server stores no result, but the tool has run
            if error.is_lease_lost:
                raise
        self._state.running = None
        return outcome

    async def _run_local_tool(self, name: str, call_id: str, arguments: Any, limit: float) -> dict[str, Any]:
        if self._mcp is not None and name in self._mcp:
            call = functools.partial(self._mcp.call_tool, name, arguments, limit)
            return await self._run_recorded(call, call_id, idempotent=False)
        tool, workspaces = self._local.get(name), self._workspaces
        if tool is None or workspaces is None:
            return {"error": {"type": "not_offered", "message": f"This worker does not offer {name}."}}

        async def run() -> Any:
            workspace = workspaces.open_workspace(self._task_id)
            return await tool.parse_arguments(arguments).run(workspace, limit)

        return await self._run_recorded(run, call_id, idempotent=tool.idempotent)

    async def _run_recorded(
        self, run: Callable[[], Awaitable[Any]], call_id: str, *, idempotent: bool
    ) -> dict[str, Any]:
        """Run a tool and return the outcome. If an earlier attempt may already have run it, return an error instead."""
        if not await self._record_start(call_id, idempotent=idempotent):
            return {"error": UNKNOWN}
        try:
            return {"result": await run()}
        except (ToolFailed, OSError, ValueError) as error:
            return {"error": {"type": "failed", "message": str(error)}}

    async def _record_start(self, call_id: str, *, idempotent: bool) -> bool:
        """Record the start of a tool in a checkpoint, unless the tool is idempotent.

        Return False if an earlier attempt already started the tool, because the tool must not run twice.
        """
        if idempotent:
            return True
        if self._state.running == call_id:
            return False
        self._state.running = call_id
        await self._checkpoint()
        return True


def _model_name(name: str) -> str:
    """Return the name under which the model sees a tool.

    Models accept names of at most 64 letters, digits, `_` and `-`, but tool names contain dots.
    """
    plain = name.replace(".", "__")
    if len(plain) <= NAME_LIMIT:
        return plain
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{plain[: NAME_LIMIT - len(digest) - 1]}_{digest}"


def _tool_definition(tool: Mapping[str, Any]) -> dict[str, Any]:
    schema = tool.get("schema") or {}
    description = tool.get("description") or schema.get("description")
    return {"name": _model_name(tool["name"]), "description": description, "schema": schema}
