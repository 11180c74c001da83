"""Tests connections and runs commands.

Each command runs in its own asyncio task, and its end is always recorded.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec

from corral.auth.principal import Principal
from corral.database.engine import Work
from corral.database.unit import UnitContext
from corral.egress.client import Egress
from corral.errors import Conflict, Forbidden, Invalid, Problem, Unavailable
from corral.plugin import Settings
from corral.redact.redactor import Redactor
from corral_plugins.circuit_breakers.api import Breakers, Verdict
from corral_plugins.ssh.api import ConnectFailed, LoginTimeout
from corral_plugins.ssh.models import Connection
from corral_plugins.ssh.service.command_rules import check_command, quote_argv
from corral_plugins.ssh.service.connections import SshConnections, host_key_mismatch_error
from corral_plugins.ssh.service.credentials import ConnectionCredentials, Credential
from corral_plugins.ssh.service.executions import STORED_BYTES, ExecutionEnd, SshExecutions
from corral_plugins.ssh.service.host_keys import fingerprint_of
from corral_plugins.ssh.service.metrics import SshMetrics
from corral_plugins.ssh.settings import CONNECT_SECONDS, LOGIN_SECONDS, MAX_OUTPUT_BYTES
from corral_plugins.ssh.shapes import CommandRequest, CommandResult, ConnectionTest

RENEW_SECONDS = 2.0
PREFIX = "ssh"


class RunContext(msgspec.Struct, frozen=True, kw_only=True):
    """A caller that runs a command. For an agent, the agent's task and approval are included."""

    by: Principal
    entry: UnitContext
    task_id: str | None = None
    approval_id: str | None = None


class _ConnectionPlan(msgspec.Struct, frozen=True, kw_only=True):
    """The data needed to connect to a machine, read in one unit of work."""

    row: Connection
    machine: dict[str, Any]
    credential: Credential | None
    max_bytes: int


class SshRunner:
    """Connects to machines. Its methods open their own units of work."""

    breakers: Breakers | None

    def __init__(
        self,
        work: Work,
        egress: Egress,
        settings: Settings,
        redactor: Redactor,
        connections: SshConnections,
        credentials: ConnectionCredentials,
        executions: SshExecutions,
        metrics: SshMetrics,
    ) -> None:
        self._work, self._egress, self._settings, self._redactor = work, egress, settings, redactor
        self._connections, self._credentials, self._executions = connections, credentials, executions
        self._metrics = metrics
        self._running: dict[str, asyncio.Task[Any]] = {}

    def declare_breakers(self) -> None:
        """Declare the circuit breakers that guard the connections to machines."""
        if self.breakers is not None:
            self.breakers.declare(PREFIX)

    async def stop(self) -> None:
        """Cancel the commands that this process runs, and wait until the end of each command is recorded."""
        running = list(self._running.values())
        for task in running:
            _cancel_once(task)
        await asyncio.gather(*running, return_exceptions=True)

    # -- the test of a connection

    async def test(self, connection_id: str, context: RunContext) -> ConnectionTest:
        """Connect to a machine and log in, without running a command. Raise an error with the reason if this fails."""
        plan = await self._work(lambda: self._plan(connection_id), entry=context.entry, read=True)
        began = time.monotonic()
        try:
            async with self._open_connection(plan, context) as opened:
                latency = round((time.monotonic() - began) * 1000)
                version = str(opened.get_extra_info("server_version"))[:255]
        except Problem as problem:
            error = problem.detail
            await self._work(lambda: self._connections.record_test(plan.row.id, error), entry=context.entry)
            raise
        await self._work(lambda: self._connections.record_test(plan.row.id, None), entry=context.entry)
        return ConnectionTest(
            fingerprint=str(fingerprint_of(plan.row.host_key)), server_version=version, latency_ms=latency
        )

    # -- commands

    async def execute(self, connection_id: str, request: CommandRequest, context: RunContext) -> CommandResult:
        """Run a command and wait until it ends. If the caller is cancelled, the command is cancelled too.

        Raise `Forbidden` (`command_denied`) if the command rules forbid the command, `TooMany` (`concurrency_limit`) if
        too many commands are running, and the same errors as `test`.
        """
        command = _command_of(request)
        shown = await asyncio.to_thread(self._redactor.redact, command)
        plan = await self._work(lambda: self._plan(connection_id), entry=context.entry, read=True)
        await self._check_rules(plan.row, command, shown, context)
        if plan.row.host_key_state == "mismatch":
            raise host_key_mismatch_error(plan.row)

        def start() -> str:
            started = self._executions.start(
                plan.row,
                command,
                shown_command=shown,
                by=context.by,
                task_id=context.task_id,
                approval_id=context.approval_id,
            )
            return str(started.id)

        await _session_module()  # before the start is recorded, so that its end is recorded whatever happens
        execution_id = await self._work(start, entry=context.entry)
        run = self._run(execution_id, plan, command, request, context)
        task = asyncio.get_running_loop().create_task(run, name=f"ssh {execution_id}")
        self._running[execution_id] = task
        task.add_done_callback(lambda _: self._running.pop(execution_id, None))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(_retrieve_exception)
            _cancel_once(task)
            raise

    def cancel_here(self, execution_id: str) -> None:
        """Stop a command immediately if it runs in this process.

        Other processes notice a cancellation within two seconds.
        """
        if task := self._running.get(execution_id):
            _cancel_once(task)

    async def _run(
        self, execution_id: str, plan: _ConnectionPlan, command: str, request: CommandRequest, context: RunContext
    ) -> CommandResult:
        from corral_plugins.ssh.service import session  # `execute` has loaded it

        began = time.monotonic()
        watch = asyncio.ensure_future(self._watch(execution_id, asyncio.current_task(), context))
        output, status = session.CommandOutput(), "completed"
        problem: Problem | None = None
        try:
            async with self._open_connection(plan, context) as opened:
                await session.run(
                    opened,
                    command,
                    output,
                    stdin=request.stdin.encode(),
                    env=request.env,
                    seconds=request.timeout_seconds,
                    limit=plan.max_bytes,
                )
            status = "timed_out" if output.timed_out else "completed"
        except asyncio.CancelledError:
            status, problem = "cancelled", Conflict("The command was cancelled.", current_status="cancelled")
        except Problem as error:
            status, problem = "failed", error
        except Exception as error:  # recorded, so that no execution stays open
            status, problem = "failed", ConnectFailed(f"{type(error).__name__}: {error}"[:300])
        finally:
            watch.cancel()
        seconds = time.monotonic() - began
        result = await self._finish(execution_id, plan.row, output, (status, problem), seconds, context)
        if problem is not None:
            raise problem
        return result

    async def _finish(
        self,
        execution_id: str,
        row: Connection,
        output: Any,
        ended: tuple[Any, Problem | None],
        seconds: float,
        context: RunContext,
    ) -> CommandResult:
        status, problem = ended
        stdout, stderr = await asyncio.to_thread(self._redacted_output, output)
        duration = round(seconds * 1000)
        end = ExecutionEnd(
            status=status,
            exit_code=output.exit_code,
            signal=output.signal,
            stdout=_head(stdout),
            stderr=_head(stderr),
            truncated=output.truncated,
            error=None if problem is None else problem.detail,
            bytes_out=output.total,
            duration_ms=duration,
        )
        self._metrics.count(status, seconds)
        await self._work(lambda: self._executions.finish(execution_id, row, end), entry=context.entry)
        return CommandResult(
            execution_id=execution_id,
            exit_code=output.exit_code,
            signal=output.signal,
            stdout=stdout,
            stderr=stderr,
            truncated=output.truncated,
            timed_out=output.timed_out,
            duration_ms=duration,
        )

    def _redacted_output(self, output: Any) -> tuple[str, str]:
        """Return the redacted text of standard output and standard error.

        Redacting long output is slow, so call this method in a thread. U+FFFD replaces invalid UTF-8 and also NUL
        characters, which PostgreSQL cannot store in text.
        """
        texts = (bytes(stream).decode(errors="replace") for stream in (output.stdout, output.stderr))
        stdout, stderr = (self._redactor.redact(text.replace("\0", "\N{REPLACEMENT CHARACTER}")) for text in texts)
        return stdout, stderr

    async def _watch(self, execution_id: str, task: asyncio.Task[Any] | None, context: RunContext) -> None:
        """Regularly record that this process is alive. Stop the command if it was cancelled through another process."""
        while True:
            await asyncio.sleep(RENEW_SECONDS)
            with contextlib.suppress(Unavailable):  # an overloaded database does not end a command
                if not await self._work(lambda: self._executions.renew(execution_id), entry=context.entry):
                    if task is not None:
                        _cancel_once(task)
                    return

    # -- connecting

    def _plan(self, connection_id: str) -> _ConnectionPlan:
        """Read a connection. Its credential is read only if the host key has been accepted."""
        row = self._connections.find(connection_id)
        is_trusted = row.host_key_state == "trusted"
        machine = {
            "host": row.hostname,
            "port": row.port,
            "username": row.username,
            "auth_method": row.auth_method,
            "host_key": row.host_key if is_trusted else None,
            "connect_seconds": float(self._settings.get(CONNECT_SECONDS)),
            "login_seconds": float(self._settings.get(LOGIN_SECONDS)),
        }
        credential = self._credentials.read(row) if is_trusted else None
        return _ConnectionPlan(
            row=row, machine=machine, credential=credential, max_bytes=self._settings.get(MAX_OUTPUT_BYTES)
        )

    @contextlib.asynccontextmanager
    async def _open_connection(self, plan: _ConnectionPlan, context: RunContext) -> AsyncIterator[Any]:
        """Connect and log in, guarded by the circuit breaker.

        If the host key has not been accepted, record the key and raise an error. Error details are redacted, because
        they may contain text from the machine, which knows the credential.
        """
        try:
            async with self._open_and_check_host_key(plan, context) as opened:
                yield opened
        except Problem as problem:
            problem.detail = await asyncio.to_thread(self._redactor.redact, problem.detail)
            raise

    @contextlib.asynccontextmanager
    async def _open_and_check_host_key(self, plan: _ConnectionPlan, context: RunContext) -> AsyncIterator[Any]:
        session = await _session_module()
        machine = session.Machine(**plan.machine)

        async def connect() -> Any:
            return await session.connect(self._egress, machine, plan.credential)

        try:
            opened = await self._call_with_breaker(f"{PREFIX}:{plan.row.id}", connect)
        except session.OtherHostKey as other:
            line = other.key_line
            problem = await self._work(lambda: self._connections.record_seen_key(plan.row, line), entry=context.entry)
            raise problem from None
        try:
            yield opened
        finally:
            opened.abort()

    async def _call_with_breaker(self, name: str, connect: Callable[[], Awaitable[Any]]) -> Any:
        return await connect() if self.breakers is None else await self.breakers.guard(name, connect, judge=_judge)

    async def _check_rules(self, row: Connection, command: str, shown: str, context: RunContext) -> None:
        check = functools.partial(check_command, allowed=row.allowed_commands, denied=row.denied_commands)
        try:
            await asyncio.to_thread(check, command)  # a hundred patterns and thousands of parts take a second
        except Forbidden as denied:
            code, reason = denied.code, denied.detail
            self._metrics.count("denied")
            await self._work(lambda: self._executions.record_denied(row, shown, code, reason), entry=context.entry)
            raise


def _cancel_once(task: asyncio.Task[Any]) -> None:
    """Cancel a command, unless it is already being cancelled.

    A second cancellation would interrupt the wait between sending the signals TERM and KILL.
    """
    if not task.cancelling():
        task.cancel()


def _retrieve_exception(task: asyncio.Task[Any]) -> None:
    """Retrieve the exception of a command whose caller was cancelled, so that asyncio does not log the exception."""
    if not task.cancelled():
        task.exception()


async def _session_module() -> Any:
    """Import and return the module `session`.

    The module imports asyncssh, which takes 0.3 s, so the import runs in a thread.
    """
    return await asyncio.to_thread(importlib.import_module, "corral_plugins.ssh.service.session")


def _judge(outcome: Any) -> Verdict:
    """Classify a connection attempt for the circuit breaker.

    Only timeouts and failures to connect count as failures. Refused logins and host keys that are not accepted do not
    count.
    """
    if isinstance(outcome, (ConnectFailed, LoginTimeout)):
        return "failure"
    return "neutral" if isinstance(outcome, Exception) else "success"


def _command_of(request: CommandRequest) -> str:
    command, argv = request.command, request.argv
    if isinstance(command, str) == isinstance(argv, list):
        raise Invalid.at("/command", "required", "Send either command or argv.")
    line = command if isinstance(command, str) else quote_argv(argv) if isinstance(argv, list) else ""
    if len(line) > 8192 or "\0" in line:
        raise Invalid.at("/argv", "too_long", "The command line may have at most 8192 characters.")
    return line


def _head(text: str) -> str:
    """Return the first 64 KiB of a string."""
    return text.encode()[:STORED_BYTES].decode(errors="ignore")
