"""Creates the plugin's tables. The classes are frozen copies of the models from the first release."""

from __future__ import annotations

from typing import Any

import peewee
from peewee import SQL, Model

from corral.database.dialect import stores_rows_in_primary_key


def up(migrator: Any, db: Any) -> None:
    class Base(Model):
        class Meta:
            database = db
            legacy_table_names = False

    class Approval(Base):
        id = peewee.CharField(max_length=36, primary_key=True)
        version = peewee.IntegerField()
        type = peewee.CharField(max_length=20)
        title = peewee.CharField(max_length=200)
        description = peewee.TextField()
        payload = peewee.TextField()
        payload_sha256 = peewee.CharField(max_length=64)
        risk = peewee.CharField(max_length=10)
        urgency = peewee.SmallIntegerField()
        requester_type = peewee.CharField(max_length=10)
        requester_id = peewee.CharField(max_length=36)
        on_behalf_of = peewee.CharField(max_length=36, null=True)
        owner_id = peewee.CharField(max_length=36, null=True)
        task_id = peewee.CharField(max_length=36, null=True)
        run_id = peewee.CharField(max_length=36, null=True)
        step = peewee.CharField(max_length=100, null=True)
        agent_id = peewee.CharField(max_length=36, null=True)
        agent_owner_id = peewee.CharField(max_length=36, null=True)
        approvers = peewee.TextField()
        required_approvals = peewee.SmallIntegerField()
        allow_self = peewee.BooleanField()
        editable = peewee.BooleanField()
        confidence = peewee.SmallIntegerField(null=True)
        rubric = peewee.TextField(null=True)
        ttl_seconds = peewee.IntegerField()
        expires_at = peewee.CharField(max_length=24)
        on_timeout = peewee.CharField(max_length=10)
        escalate_to = peewee.TextField(null=True)
        escalated = peewee.BooleanField()
        reminded_at = peewee.CharField(max_length=24)
        status = peewee.CharField(max_length=20)
        decisions = peewee.TextField()
        edited_payload = peewee.TextField(null=True)
        edited_sha256 = peewee.CharField(max_length=64, null=True)
        outcome_note = peewee.TextField(null=True)
        tool_call = peewee.TextField(null=True)
        execution = peewee.TextField(null=True)
        step_policy = peewee.TextField(null=True)
        created_at = peewee.CharField(max_length=24)
        updated_at = peewee.CharField(max_length=24)
        resolved_at = peewee.CharField(max_length=24, null=True)
        consumed_at = peewee.CharField(max_length=24, null=True)

        class Meta:
            table_name = "approvals_approvals"
            indexes = (
                (("status", "urgency", "expires_at", "id"), False),
                (("urgency", "expires_at", "id"), False),
                (("agent_id", "urgency", "expires_at", "id"), False),
                (("task_id", "payload_sha256"), False),
                (("run_id",), False),
            )

    class Approver(Base):
        approval_id = peewee.CharField(max_length=36)
        kind = peewee.CharField(max_length=4)
        name = peewee.CharField(max_length=36)

        class Meta:
            table_name = "approvals_approvers"
            primary_key = peewee.CompositeKey("kind", "name", "approval_id")
            indexes = ((("approval_id",), False),)
            without_rowid = stores_rows_in_primary_key(db)

    class Comment(Base):
        id = peewee.CharField(max_length=36, primary_key=True)
        approval_id = peewee.CharField(max_length=36)
        author_type = peewee.CharField(max_length=10)
        author_id = peewee.CharField(max_length=36)
        body = peewee.TextField()
        created_at = peewee.CharField(max_length=24)

        class Meta:
            table_name = "approvals_comments"
            indexes = ((("approval_id", "created_at", "id"), False),)

    is_open = SQL("status IN ('pending', 'revision_requested')")
    for name, column in (("due", Approval.expires_at), ("remind", Approval.reminded_at), ("open", Approval.task_id)):
        Approval.add_index(Approval.index(column, name=f"approvals_approvals_{name}", where=is_open))
    db.create_tables([Approval, Approver, Comment])
