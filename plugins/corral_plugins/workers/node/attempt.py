"""An attempt of a task, which runs in a separate process with the attempt token.

The base class reports how the attempt ends, and stores its checkpoints and log lines. `AgentLoop` lets a model work on
the task; `ToolRun` makes a single tool call.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any, Literal, NoReturn

from corral_plugins.workers.node.client import (
    ApiError,
    CancelRequested,
    ServerUnreachable,
    WorkerApiClient,
    WorkerLeaseLost,
)
from corral_plugins.workers.node.conversation import AttemptState
from corral_plugins.workers.node.task_process import CANCELLED, LOST, REPORTED
from corral_plugins.workers.node.tool_client import TaskWaitsForPerson, ToolClient
from corral_plugins.workers.node.tools.mcp import McpToolbox
from corral_plugins.workers.node.tools.workspace import Workspaces

UNREADABLE = (
    "This worker cannot read the task's checkpoint, which another worker wrote: {}. Let that worker run the task, or "
    "retry the task with from_checkpoint=false to start it from the beginning."
)

Control = Literal["drain", "budget"]
"""A request from the worker to a running attempt.

`drain` asks the attempt to release the task after the current step. `budget` asks the attempt to finish soon because
most of the budget has been used.
"""


class AttemptEnded(Exception):
    """Raised to end an attempt after its outcome has been reported. The argument is the outcome."""


class Attempt(abc.ABC):
    """The attempt of one claim.

    `controls` contains the `Control` requests received from the worker so far. More can be added at any time.
    """

    def __init__(
        self,
        client: WorkerApiClient,
        claim: Mapping[str, Any],
        controls: set[str],
        *,
        allowed: Iterable[str] = (),
        workspaces: Workspaces | None = None,
        mcp: McpToolbox | None = None,
    ) -> None:
        self._client, self._claim, self._controls = client, claim, controls
        self._task, self._agent = claim["task"], claim["agent"]
        self._id: str = self._task["id"]
        self._state = AttemptState(claim)
        self._tools = ToolClient(
            client, claim, self._state, self._store_checkpoint, allowed=allowed, workspaces=workspaces, mcp=mcp
        )
        self._workspaces = workspaces
        self._lines = 0
        self.outcome = ""
        """The reported outcome in words, such as `completed` or `failed: provider_error`, for the log of the worker."""

    async def run(self) -> int:
        """Run the attempt and return the exit status of the process. Any exception is treated as a crash."""
        try:
            if self._state.invalid is not None:  # starting from the beginning could repeat earlier actions
                message = UNREADABLE.format(self._state.invalid)
                await self._fail_attempt("checkpoint_unreadable", message, retryable=False)
            await self._run_steps()
        except AttemptEnded as ended:
            self.outcome = str(ended)
            return REPORTED
        except TaskWaitsForPerson:
            self.outcome = "waits for a person"
            return REPORTED
        except WorkerLeaseLost:
            return LOST
        except CancelRequested:
            return CANCELLED
        except ApiError as error:
            if error.is_lease_lost:
                return LOST
            raise

    @abc.abstractmethod
    async def _run_steps(self) -> NoReturn:
        """Perform the work of the task. The method ends by raising `AttemptEnded` or `TaskWaitsForPerson`."""

    # -- ending the attempt

    async def _complete_task(self, result: Any) -> NoReturn:
        try:
            await self._client.complete_task(self._id, result)
        except ApiError as error:
            if error.is_lease_lost:
                raise WorkerLeaseLost from None
            await self._fail_attempt("result_refused", error.detail, retryable=False)
        if self._workspaces is not None:
            self._workspaces.remove_workspace(self._id)
        raise AttemptEnded("completed")

    async def _fail_attempt(self, kind: str, message: str, *, retryable: bool) -> NoReturn:
        await self._client.fail_task(self._id, kind, message, retryable=retryable)
        raise AttemptEnded(f"failed: {kind}")

    async def _release_task(self, reason: str) -> NoReturn:
        await self._client.release_task(self._id, reason)
        raise AttemptEnded(f"was released: {reason}")

    async def _release_blocked_task(self, error: ApiError) -> NoReturn:
        """Release the task because the server refused a call for a reason unrelated to the task. Log this reason."""
        await self._append_log(f"The task returns to its queue: {error.detail}", level="warning")
        await self._release_task(error.code)

    async def _release_for_drain(self) -> None:
        if "drain" in self._controls:
            await self._store_checkpoint()
            await self._release_task("drain")

    async def _store_checkpoint(self) -> None:
        """Store a checkpoint.

        If the checkpoint is too large, the server keeps the previous checkpoint, and the next attempt resumes from that
        one.
        """
        try:
            await self._client.store_checkpoint(self._id, self._state.step, self._state.to_checkpoint())
        except ApiError as error:
            if error.status not in (413, 422):
                raise
            await self._append_log(f"The checkpoint after step {self._state.step} was not stored: {error.detail}")

    async def _append_log(self, message: str, level: str = "info") -> None:
        """Append a line to the log of the task.

        Raise `WorkerLeaseLost` if the lease has ended. Other failures are ignored.
        """
        self._lines += 1
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        try:
            await self._client.append_logs(
                self._id, [{"seq": self._lines, "ts": now, "level": level, "message": message}]
            )
        except (ApiError, ServerUnreachable) as error:
            if isinstance(error, ApiError) and error.is_lease_lost:
                raise WorkerLeaseLost from None
