"""The records of commands: when they started and ended, and who ran them.

All methods run in the caller's unit of work.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import UNSET

from corral import clock
from corral.auth.principal import Principal
from corral.errors import Conflict, NotFound, TooMany
from corral.events.event import emit
from corral.http.page import Order, Page, paginate
from corral.ids import new_id
from corral.plugin import Audit, AuditEntry
from corral_plugins.ssh.api import SshExecuted
from corral_plugins.ssh.models import Connection, Execution
from corral_plugins.ssh.shapes import CommandExecutionView, ExecutionItem, ExecutionQuery, ExecutionStatus

STORED_BYTES = 64 * 1024
ALIVE_SECONDS = 20.0
"""The number of seconds after which a running command counts as abandoned.

The period restarts whenever the process that runs the command reports that it is still alive.
"""
BATCH_ROWS = 500
RUNNING = Execution.status == "running"


class ExecutionEnd(msgspec.Struct, frozen=True, kw_only=True):
    """The outcome of a command. All strings have been redacted."""

    status: ExecutionStatus
    exit_code: int | None = None
    signal: str | None = None
    stdout: str = ""
    stderr: str = ""
    truncated: bool = False
    error: str | None = None
    bytes_out: int = 0
    duration_ms: int = 0


class SshExecutions:
    """Manages the records of commands."""

    audit: Audit | None

    # -- reading

    def list(self, connection_id: str, query: ExecutionQuery, *, by: Principal) -> Page[ExecutionItem]:
        """Return a page of a connection's commands, newest first, even if the connection has been deleted.

        Raise `NotFound` if there is neither such a connection nor a command of it.
        """
        where: Any = Execution.connection_id == connection_id.lower()
        known = Connection.select().where(Connection.id == connection_id.lower()).exists()
        if not known and not Execution.select().where(where).exists():
            raise NotFound("There is no SSH connection with this id.")
        if query.status is not UNSET:
            where &= Execution.status.in_(query.status)
        order = (Order(Execution.started_at), Order(Execution.id))
        return paginate(Execution.select().where(where), query, by, scope="ssh.executions", order=order, make=_item)

    def get(self, connection_id: str, execution_id: str) -> CommandExecutionView:
        """Return the record of a command with its output. Raise `NotFound` if there is no such command."""
        row = self._find(connection_id, execution_id)
        return CommandExecutionView(**_fields(row), stdout=row.stdout, stderr=row.stderr)

    # -- the life of a command

    def start(
        self,
        connection: Connection,
        command: str,
        *,
        shown_command: str,
        by: Principal,
        task_id: str | None = None,
        approval_id: str | None = None,
    ) -> Execution:
        """Record that a command starts. `shown_command` is the redacted command.

        Raise `TooMany` if too many commands are running, and `Conflict` if the connection was changed or deleted after
        its rules were checked.
        """
        is_unchanged = (Connection.id == connection.id) & (Connection.version == connection.version)
        if not Connection.update(name=Connection.name).where(is_unchanged).execute():  # locks the row
            raise Conflict(
                "The connection was changed by another request at the same time; repeat the request.",
                current_status="changed",
            )
        mine = (Execution.connection_id == connection.id) & RUNNING
        if Execution.select().where(mine).count() >= connection.max_concurrency:
            detail = f"{connection.max_concurrency} commands are already running on {connection.name}."
            raise TooMany(detail, code="concurrency_limit", retry_after=5)
        row = Execution(
            id=new_id(),
            connection_id=connection.id,
            command=shown_command,
            actor=f"{by.kind}:{by.id}",
            task_id=task_id,
            approval_id=approval_id,
            status="running",
            started_at=clock.now(),
            alive_until=clock.now(ALIVE_SECONDS),
        )
        Execution.insert(row.__data__).execute()
        self._record_audit("start", connection, {"execution_id": row.id, "command": shown_command})
        return row

    def record_denied(self, connection: Connection, shown_command: str, code: str, reason: str) -> None:
        """Record in the audit log that the command rules refused a command."""
        details = {"command": shown_command, "reason": reason}
        self._record_audit("start", connection, details, outcome="denied", code=code)

    def renew(self, execution_id: str) -> bool:
        """Record that the process running a command is still alive. Return False if the command was cancelled."""
        alive = Execution.update(alive_until=clock.now(ALIVE_SECONDS)).where((Execution.id == execution_id) & RUNNING)
        return bool(alive.execute())

    def finish(self, execution_id: str, connection: Connection, end: ExecutionEnd) -> bool:
        """Record the end of a command.

        Return False if the command was already recorded as ended. In this case, only its output is stored.
        """
        fields = msgspec.structs.asdict(end)
        finished = {"finished_at": clock.now(), "alive_until": None}
        running = (Execution.id == execution_id) & RUNNING
        if not Execution.update({**fields, **finished}).where(running).execute():
            output = {key: fields[key] for key in ("stdout", "stderr", "truncated", "bytes_out", "duration_ms")}
            Execution.update(output).where(Execution.id == execution_id).execute()
            return False
        self._announce(Execution.get_by_id(execution_id), connection.name)
        return True

    def cancel(self, connection_id: str, execution_id: str) -> CommandExecutionView:
        """Record that a running command is cancelled.

        The process that runs the command stops it on the machine within seconds. Raise `NotFound` if there is no such
        command, and `Conflict` if it has already ended.
        """
        row = self._find(connection_id, execution_id)
        values = {"status": "cancelled", "finished_at": clock.now(), "alive_until": None}
        if not Execution.update(values).where((Execution.id == row.id) & RUNNING).execute():
            raise Conflict("The command has already ended.", current_status=row.status)
        row = Execution.get_by_id(row.id)
        self._announce(row, _connection_names([row])[row.connection_id])
        return self.get(connection_id, execution_id)

    def interrupt_abandoned(self) -> int:
        """Mark running commands as interrupted if the process that ran them has died.

        Return the number of commands that appeared to be abandoned. Some of them may have ended in the meantime.
        """
        is_abandoned = RUNNING & (Execution.alive_until < clock.now())
        found = Execution.select(Execution.id).where(is_abandoned).limit(BATCH_ROWS)
        error = "The process that ran the command ended; whether the command ended is unknown."
        values = {"status": "interrupted", "error": error, "finished_at": clock.now(), "alive_until": None}
        ids = [row.id for row in found]
        # A command may have ended, or told that its process is alive, since it was read.
        update = Execution.update(values).where(Execution.id.in_(ids) & is_abandoned)
        rows: list[Execution] = list(update.returning(Execution).execute())
        names = _connection_names(rows)
        for row in rows:
            self._announce(row, names[row.connection_id])
        return len(ids)

    def _announce(self, row: Execution, name: str) -> None:
        """Emit the event about the end of a command, and record the end in the audit log."""
        duration = row.duration_ms or 0
        event = SshExecuted(
            execution_id=row.id,
            connection_id=row.connection_id,
            actor=row.actor,
            status=row.status,
            exit_code=row.exit_code,
            duration_ms=duration,
        )
        emit(event, object=("ssh_connection", row.connection_id))
        if self.audit is not None:
            details = {"execution_id": row.id, "status": row.status, "exit_code": row.exit_code}
            outcome: Any = "success" if row.status == "completed" else "failed"
            entry = AuditEntry(
                action="ssh.command.finish",
                object_type="ssh_connection",
                object_id=row.connection_id,
                object_name=name,
                outcome=outcome,
                code=None if outcome == "success" else row.status,
                details=details,
            )
            self.audit.record(entry)

    def _record_audit(
        self, verb: str, connection: Connection, details: dict[str, Any], *, outcome: Any = "success", code: Any = None
    ) -> None:
        if self.audit is not None:
            entry = AuditEntry(
                action=f"ssh.command.{verb}",
                object_type="ssh_connection",
                object_id=connection.id,
                object_name=connection.name,
                outcome=outcome,
                code=code,
                details=details,
            )
            self.audit.record(entry)

    @staticmethod
    def _find(connection_id: str, execution_id: str) -> Execution:
        where = (Execution.id == execution_id.lower()) & (Execution.connection_id == connection_id.lower())
        row: Execution | None = Execution.get_or_none(where)
        if row is None:
            raise NotFound("There is no execution with this id; `corral ssh executions NAME` lists the executions.")
        return row


def _connection_names(rows: Sequence[Execution]) -> dict[str, str]:
    """Return the names of the commands' connections, keyed by connection id.

    For a deleted connection, the id takes the place of the name.
    """
    ids = {row.connection_id for row in rows}
    found: Any = Connection.select(Connection.id, Connection.name).where(Connection.id.in_(ids)).tuples()
    return {**{each: each for each in ids}, **dict(found)}


def delete_old_executions(days: int, limit: int) -> int:
    """Delete the records of up to `limit` ended commands that are more than `days` days old.

    Return the number of deleted records.
    """
    before = clock.now(-days * 86_400)
    old = Execution.select(Execution.id).where((Execution.started_at < before) & ~RUNNING).limit(limit)
    return int(Execution.delete().where(Execution.id.in_(old)).execute())


def _fields(row: Execution) -> dict[str, Any]:
    return {name: getattr(row, name) for name in ExecutionItem.__struct_fields__}


def _item(row: Execution) -> ExecutionItem:
    return ExecutionItem(**_fields(row))
