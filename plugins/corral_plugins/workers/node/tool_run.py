"""Runs a task whose claim specifies a tool call, for example a step of a workflow. No model is involved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from corral_plugins.workers.node.attempt import Attempt
from corral_plugins.workers.node.client import RELEASE_CODES, ApiError
from corral_plugins.workers.node.conversation import parse_json

UNKNOWN = "outcome_unknown"
SHOWN = 1000  # characters of the output of failed code


class ToolRun(Attempt):
    """Makes the tool call of one claim.

    The call keeps the same id in every attempt until it has failed. A call that an earlier attempt made is therefore
    not repeated. A call whose outcome is unknown is never repeated.
    """

    async def _run_steps(self) -> NoReturn:
        executor: Mapping[str, Any] = self._agent["config"]["executor"]
        results = {each.get("call_id"): each for each in (self._claim.get("resume") or {}).get("tool_results") or ()}
        n = 0
        while True:
            n += 1
            call_id = f"step-{n}"
            resumed = results.get(call_id)
            outcome = resumed if resumed is not None else await self._call(executor, call_id)
            error = _error_of(outcome)
            if error is None:
                await self._complete(executor, outcome.get("result"))
            is_earlier = resumed is None and outcome.get("attempt", self._claim["fence"]) != self._claim["fence"]
            if not is_earlier or error["type"] == UNKNOWN:
                await self._fail(executor, outcome, error)

    async def _call(self, executor: Mapping[str, Any], call_id: str) -> Mapping[str, Any]:
        try:
            return await self._tools.run_call(executor["tool"], call_id, executor["arguments"])
        except ApiError as error:
            if error.is_lease_lost:
                raise
            if error.code in RELEASE_CODES:
                await self._release_blocked_task(error)
            faults = [f"{fault.get('pointer')}: {fault.get('detail')}" for fault in error.members.get("errors") or ()]
            reason = error.members.get("reason") or error.code
            is_temporary = error.status >= 500 or error.status == 429  # the server did not make the call
            await self._fail_attempt(reason, " ".join([error.detail, *faults]), retryable=is_temporary)

    async def _complete(self, executor: Mapping[str, Any], result: Any) -> NoReturn:
        """Complete the task with the tool's result, or with the JSON value printed by the code of a `code` step.

        If that code failed, or if the last line that it printed is not JSON, fail the attempt instead.
        """
        if executor.get("returns") != "json" or not isinstance(result, dict) or "output" not in result:
            await self._complete_task(result)
        output = str(result["output"]).strip()
        if result.get("timed_out"):
            await self._fail_attempt("timeout", "The code exceeded its time limit.", retryable=False)
        if result.get("exit_code"):
            message = f"The code ended with the exit code {result['exit_code']}: {output[-SHOWN:]}"
            await self._fail_attempt("exit_code", message, retryable=True)
        for text in (output, output.rpartition("\n")[2]):
            try:
                value = parse_json(text or "null", "output")
            except ValueError:
                continue
            await self._complete_task(value)
        message = f"The last line that the code printed is not JSON: {output[-SHOWN:]}"
        await self._fail_attempt("invalid_output", message, retryable=False)

    async def _fail(
        self, executor: Mapping[str, Any], outcome: Mapping[str, Any], error: Mapping[str, Any]
    ) -> NoReturn:
        """Fail the attempt. If the call was not allowed, or may have had an effect, the task is not retried."""
        risks = {tool["name"]: tool.get("risk") for tool in self._agent.get("tools") or ()}
        is_unknown = error["type"] == UNKNOWN or (
            error["type"] == "timeout" and risks.get(executor["tool"], "dangerous") == "dangerous"
        )
        is_refused = outcome.get("status") in ("denied", "expired")
        await self._fail_attempt(error["type"], error["message"], retryable=not (is_unknown or is_refused))


def _error_of(outcome: Mapping[str, Any]) -> dict[str, str] | None:
    """Return the type and message of the error if a call failed or did not run. Otherwise, return None."""
    error, status = outcome.get("error"), outcome.get("status")
    if error is None and status not in ("denied", "expired"):
        return None
    found = error if isinstance(error, Mapping) else {"message": error}
    message = found.get("message") or outcome.get("reason") or "The call did not succeed."
    return {"type": str(found.get("type") or status or "error"), "message": str(message)}
