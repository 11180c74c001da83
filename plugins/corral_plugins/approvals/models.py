"""The database tables for approvals. Only the service layer of this plugin writes to them."""

from __future__ import annotations

import peewee

from corral.database.model import SHARED, IdField, InstantField, JSONField, Model


class Approval(Model):
    """A request that people approve or reject.

    Lists are sorted by `urgency`, which is 0 for the highest risk. `payload_sha256` is the hash of the requested
    payload, and `edited_sha256` is the hash of an approver's edited version. `tool_call` contains the facts about a
    held tool call, and `step_policy` contains the settings `on_reject` and `on_timeout` of a workflow step.
    `ttl_seconds` is the number of seconds within which people must decide. An escalation restarts this period.
    """

    visibility = SHARED
    owner_field = "owner_id"

    id = IdField(primary_key=True)
    version = peewee.IntegerField(default=1)
    type = peewee.CharField(max_length=20)
    title = peewee.CharField(max_length=200)
    description = peewee.TextField(default="")
    payload = JSONField()
    payload_sha256 = peewee.CharField(max_length=64)
    risk = peewee.CharField(max_length=10)
    urgency = peewee.SmallIntegerField()
    requester_type = peewee.CharField(max_length=10)
    requester_id = IdField()
    on_behalf_of = IdField(null=True)
    owner_id = IdField(null=True)
    task_id = IdField(null=True)
    run_id = IdField(null=True)
    step = peewee.CharField(max_length=100, null=True)
    agent_id = IdField(null=True)
    agent_owner_id = IdField(null=True)
    approvers = JSONField()
    required_approvals = peewee.SmallIntegerField(default=1)
    allow_self = peewee.BooleanField(default=False)
    editable = peewee.BooleanField(default=False)
    confidence = peewee.SmallIntegerField(null=True)
    rubric = JSONField(null=True)
    ttl_seconds = peewee.IntegerField()
    expires_at = InstantField()
    on_timeout = peewee.CharField(max_length=10, default="reject")
    escalate_to = JSONField(null=True)
    escalated = peewee.BooleanField(default=False)
    reminded_at = InstantField()
    status = peewee.CharField(max_length=20, default="pending")
    decisions = JSONField(default=list)
    edited_payload = JSONField(null=True)
    edited_sha256 = peewee.CharField(max_length=64, null=True)
    outcome_note = peewee.TextField(null=True)
    tool_call = JSONField(null=True)
    execution = JSONField(null=True)
    step_policy = JSONField(null=True)
    created_at = InstantField()
    updated_at = InstantField()
    resolved_at = InstantField(null=True)
    consumed_at = InstantField(null=True)

    class Meta:
        table_name = "approvals_approvals"
        indexes = (
            (("status", "urgency", "expires_at", "id"), False),
            (("urgency", "expires_at", "id"), False),
            (("agent_id", "urgency", "expires_at", "id"), False),
            (("task_id", "payload_sha256"), False),
            (("run_id",), False),
        )


IS_OPEN = peewee.SQL("status IN ('pending', 'revision_requested')")
"""The SQL condition for undecided approval requests.

The values are literals, because query planners do not use a partial index for a condition with parameters.
"""

Approval.add_index(Approval.index(Approval.expires_at, name="approvals_approvals_due", where=IS_OPEN))
Approval.add_index(Approval.index(Approval.reminded_at, name="approvals_approvals_remind", where=IS_OPEN))
Approval.add_index(Approval.index(Approval.task_id, name="approvals_approvals_open", where=IS_OPEN))


class ApproverRow(Model):
    """A user or a role that may decide an approval request.

    `kind` is `user` or `role`. `name` is the id of the user or the name of the role.
    """

    approval_id = IdField()
    kind = peewee.CharField(max_length=4)
    name = peewee.CharField(max_length=36)

    class Meta:
        table_name = "approvals_approvers"
        primary_key = peewee.CompositeKey("kind", "name", "approval_id")
        indexes = ((("approval_id",), False),)


class CommentRow(Model):
    """A comment on an approval. Comments are delivered to the requester."""

    visibility = SHARED

    id = IdField(primary_key=True)
    approval_id = IdField()
    author_type = peewee.CharField(max_length=10)
    author_id = IdField()
    body = peewee.TextField()
    created_at = InstantField()

    class Meta:
        table_name = "approvals_comments"
        indexes = ((("approval_id", "created_at", "id"), False),)


TABLES: tuple[type[Model], ...] = (Approval, ApproverRow, CommentRow)
