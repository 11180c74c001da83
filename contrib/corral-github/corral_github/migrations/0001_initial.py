"""Creates the plugin's tables. The classes are frozen copies of the models from the first release."""

from __future__ import annotations

from typing import Any

from peewee import BooleanField, CharField, IntegerField, Model, TextField


def up(migrator: Any, db: Any) -> None:
    class Base(Model):
        class Meta:
            database = db
            legacy_table_names = False

    class Repository(Base):
        id = CharField(primary_key=True, max_length=36)
        version = IntegerField(default=1)
        name = CharField(max_length=140)
        api_url = CharField(max_length=300)
        token_secret = CharField(max_length=100)
        webhook_secret = CharField(max_length=100)
        agent_id = CharField(max_length=36)
        reviewer_agent_id = CharField(max_length=36, null=True)
        pull_requests = CharField(max_length=11)
        issue_labels = TextField()
        enabled = BooleanField(default=True)
        owner_id = CharField(max_length=36)
        paused_until = CharField(max_length=24, null=True)
        last_error = TextField(null=True)
        created_at = CharField(max_length=24)
        updated_at = CharField(max_length=24)

        class Meta:
            table_name = "github_repositories"
            indexes = ((("api_url", "name"), True), (("created_at", "id"), False))

    class Thread(Base):
        id = CharField(primary_key=True, max_length=36)
        repository_id = CharField(max_length=36)
        kind = CharField(max_length=5)
        number = IntegerField()
        review_id = CharField(max_length=36, null=True)
        task_id = CharField(max_length=36, null=True)
        head_sha = CharField(max_length=64, null=True)
        heads = TextField()
        seen_at = CharField(max_length=40, null=True)
        lease = CharField(max_length=36, null=True)
        lease_until = CharField(max_length=24, null=True)
        run_at = CharField(max_length=24, null=True)
        failures = IntegerField(default=0)

        class Meta:
            table_name = "github_threads"
            indexes = (
                (("repository_id", "kind", "number"), True),
                (("review_id",), False),
                (("task_id",), False),
                (("run_at",), False),
            )

    class Delivery(Base):
        id = CharField(primary_key=True, max_length=36)
        repository_id = CharField(max_length=36)
        thread_id = CharField(max_length=36, null=True)
        delivery_id = CharField(max_length=100)
        body_sha256 = CharField(max_length=64)
        event = CharField(max_length=50)
        action = CharField(max_length=50)
        facts = TextField(null=True)
        status = CharField(max_length=7)
        detail = TextField(null=True)
        created_at = CharField(max_length=24)
        waiting_since = CharField(max_length=24)
        finished_at = CharField(max_length=24, null=True)

        class Meta:
            table_name = "github_deliveries"
            indexes = (
                (("repository_id", "delivery_id"), True),
                (("repository_id", "body_sha256"), True),
                (("repository_id", "created_at", "id"), False),
                (("thread_id", "status", "id"), False),
                (("created_at",), False),
            )

    class Post(Base):
        id = CharField(primary_key=True, max_length=36)
        repository_id = CharField(max_length=36)
        thread_id = CharField(max_length=36)
        kind = CharField(max_length=7)
        source = CharField(max_length=80, unique=True)
        content = TextField()
        status = CharField(max_length=7, default="pending")
        attempts = IntegerField(default=0)
        url = TextField(null=True)
        detail = TextField(null=True)
        created_at = CharField(max_length=24)
        waiting_since = CharField(max_length=24)
        finished_at = CharField(max_length=24, null=True)

        class Meta:
            table_name = "github_posts"
            indexes = (
                (("repository_id", "created_at", "id"), False),
                (("thread_id", "status", "id"), False),
                (("created_at",), False),
            )

    db.create_tables([Repository, Thread, Delivery, Post])
