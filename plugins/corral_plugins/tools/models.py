"""Tables of the `tools` plugin. Only the service layer of this plugin writes to these tables."""

from __future__ import annotations

import peewee

from corral.database.model import ADMIN, SHARED, IdField, InstantField, JSONField, Model
from corral.database.sealed_columns import SealedField


class ToolRow(Model):
    """The values with which admins override a tool definition.

    Null means that the value from the definition applies.
    """

    name = peewee.CharField(max_length=200, primary_key=True)
    version = peewee.IntegerField()
    enabled = peewee.BooleanField(default=True)
    default_policy = peewee.CharField(max_length=5, null=True)
    risk = peewee.CharField(max_length=10, null=True)
    timeout_seconds = peewee.IntegerField(null=True)
    config = JSONField(null=True)
    updated_at = InstantField()
    updated_by = IdField(null=True)

    visibility = SHARED

    class Meta:
        table_name = "tools_tools"


class ToolCallRow(Model):
    """One tool call.

    `arguments` contains the redacted arguments. `arguments_sha256` is the hash of the original arguments. `alive_until`
    is the time after which a running or permitted call is considered abandoned, or null while the call waits for a
    person. `executions` is the number of the current execution, and prevents a process that ran an earlier execution
    from changing the row. The status of a call that needs an approval is `pending_approval` until the call is
    rejected or expires, or until it is approved and the tool starts; `approved_at` is the time when people approved the
    call. `held_arguments` is the encrypted JSON of the original arguments, if they differ from the redacted arguments.
    """

    id = IdField(primary_key=True)
    call_id = peewee.CharField(max_length=64)
    task_id = IdField()
    fence = peewee.IntegerField()
    lease_id = IdField()
    agent_id = IdField()
    worker_id = IdField(null=True)
    requester_id = IdField(null=True)
    tool = peewee.CharField(max_length=200)
    arguments = JSONField()
    arguments_sha256 = peewee.CharField(max_length=64)
    decision = peewee.CharField(max_length=8)
    reason = peewee.CharField(max_length=40, null=True)
    status = peewee.CharField(max_length=16)
    result = JSONField(null=True)
    error = JSONField(null=True)
    tainted = peewee.BooleanField(default=False)
    executions = peewee.IntegerField(default=0)
    approval_id = IdField(null=True)
    approved_at = InstantField(null=True)
    held_arguments = SealedField(null=True)
    permit_until = InstantField(null=True)
    alive_until = InstantField(null=True)
    created_at = InstantField()
    finished_at = InstantField(null=True)
    duration_ms = peewee.BigIntegerField(null=True)

    visibility = SHARED
    owner_field = "requester_id"

    class Meta:
        table_name = "tools_calls"
        indexes = (
            (("task_id", "call_id"), True),
            (("task_id", "created_at", "id"), False),
            (("created_at", "id"), False),
            (("agent_id", "created_at", "id"), False),
            (("tool", "created_at", "id"), False),
        )


ToolCallRow.add_index(
    ToolCallRow.index(
        ToolCallRow.alive_until, name="tools_calls_alive", where=peewee.SQL("status IN ('running', 'permitted')")
    )
)
ToolCallRow.add_index(
    ToolCallRow.index(
        ToolCallRow.task_id, name="tools_calls_open", where=peewee.SQL("status IN ('running', 'permitted')")
    )
)
ToolCallRow.add_index(
    ToolCallRow.index(ToolCallRow.approval_id, name="tools_calls_held", where=peewee.SQL("status = 'pending_approval'"))
)


class McpServerRow(Model):
    """An MCP server that is reached over HTTP.

    `last_error` is the reason for the last failure to list the tools, or null if the last attempt succeeded.
    `listed_at` is the time when the tools were last listed. `headers_secret` is the name of the secret that is sent to
    the server.
    """

    name = peewee.CharField(max_length=64, primary_key=True)
    version = peewee.IntegerField()
    transport = peewee.CharField(max_length=8)
    url = peewee.TextField()
    headers_secret = peewee.CharField(max_length=200, null=True)
    enabled = peewee.BooleanField(default=True)
    last_error = peewee.TextField(null=True)
    listed_at = InstantField(null=True)
    ignored_tools = JSONField()
    created_at = InstantField()
    updated_at = InstantField()

    visibility = ADMIN

    class Meta:
        table_name = "tools_mcp_servers"


class McpToolRow(Model):
    """A tool of an MCP server, as the server last described it.

    `remote_name` is the server's own name for the tool. `definition_sha256` is the hash of the definition; agents may
    call the tool only while this hash equals `accepted_sha256`, the hash of the definition that an admin accepted.
    `is_listed` is false while the server does not list the tool.
    """

    name = peewee.CharField(max_length=200, primary_key=True)
    server = peewee.CharField(max_length=64)
    remote_name = peewee.CharField(max_length=128)
    definition = JSONField()
    definition_sha256 = peewee.CharField(max_length=64)
    accepted_sha256 = peewee.CharField(max_length=64, null=True)
    is_listed = peewee.BooleanField(default=True)

    visibility = ADMIN

    class Meta:
        table_name = "tools_mcp_tools"
        indexes = ((("server", "name"), False),)


TABLES: tuple[type[Model], ...] = (ToolRow, ToolCallRow, McpServerRow, McpToolRow)
