"""The plugin's database tables. Only the modules in the `service` package write to them."""

from __future__ import annotations

import peewee

from corral.database.model import SHARED, IdField, InstantField, JSONField, Model


class Repository(Model):
    """A connected repository. `name` is in lower case, because the code host ignores case.

    Corral works with the permissions of `owner_id`, the admin who connected the repository or last changed it.
    `paused_until` is the time until which the code host has asked Corral to send it no requests.
    """

    visibility = SHARED
    owner_field = "owner_id"

    id = IdField(primary_key=True)
    version = peewee.IntegerField(default=1)
    name = peewee.CharField(max_length=140)
    api_url = peewee.CharField(max_length=300)
    token_secret = peewee.CharField(max_length=100)
    webhook_secret = peewee.CharField(max_length=100)
    agent_id = IdField()
    reviewer_agent_id = IdField(null=True)
    pull_requests = peewee.CharField(max_length=11)
    issue_labels = JSONField()
    enabled = peewee.BooleanField(default=True)
    owner_id = IdField()
    paused_until = InstantField(null=True)
    last_error = peewee.TextField(null=True)
    created_at = InstantField()
    updated_at = InstantField()

    class Meta:
        table_name = "github_repositories"
        indexes = ((("api_url", "name"), True), (("created_at", "id"), False))


class Thread(Model):
    """A pull request or an issue, and the code review or task that Corral created for it.

    Deliveries and posts of one thread are processed in order, by the process that holds the `lease`, which expires at
    `lease_until`. `run_at` is the time at which the next delivery or post is due, or null if none is pending. `heads`
    maps revision numbers of the review to commit hashes. `seen_at` is the time of the change to the issue for which
    Corral created its last task, according to the code host's clock.
    """

    visibility = SHARED

    id = IdField(primary_key=True)
    repository_id = IdField()
    kind = peewee.CharField(max_length=5)
    number = peewee.IntegerField()
    review_id = IdField(null=True)
    task_id = IdField(null=True)
    head_sha = peewee.CharField(max_length=64, null=True)
    heads = JSONField()
    seen_at = peewee.CharField(max_length=40, null=True)
    lease = IdField(null=True)
    lease_until = InstantField(null=True)
    run_at = InstantField(null=True)
    failures = peewee.IntegerField(default=0)

    class Meta:
        table_name = "github_threads"
        indexes = (
            (("repository_id", "kind", "number"), True),
            (("review_id",), False),
            (("task_id",), False),
            (("run_at",), False),
        )


class Delivery(Model):
    """A webhook delivery from the code host.

    `facts` contains the parts of the payload that the handler needs. It is cleared after the delivery has been handled.
    """

    visibility = SHARED

    id = IdField(primary_key=True)
    repository_id = IdField()
    thread_id = IdField(null=True)
    delivery_id = peewee.CharField(max_length=100)
    body_sha256 = peewee.CharField(max_length=64)
    event = peewee.CharField(max_length=50)
    action = peewee.CharField(max_length=50)
    facts = JSONField(null=True)
    status = peewee.CharField(max_length=7)
    detail = peewee.TextField(null=True)
    created_at = InstantField()
    waiting_since = InstantField()
    finished_at = InstantField(null=True)

    class Meta:
        table_name = "github_deliveries"
        indexes = (
            (("repository_id", "delivery_id"), True),
            (("repository_id", "body_sha256"), True),
            (("repository_id", "created_at", "id"), False),
            (("thread_id", "status", "id"), False),
            (("created_at",), False),
        )


class Post(Model):
    """A comment or a review to post. `source` identifies the reported event, so that no event is reported twice.

    `attempts` is incremented before each request. Before every attempt except the first, Corral checks whether the code
    host already has the post.
    """

    visibility = SHARED

    id = IdField(primary_key=True)
    repository_id = IdField()
    thread_id = IdField()
    kind = peewee.CharField(max_length=7)
    source = peewee.CharField(max_length=80, unique=True)
    content = JSONField()
    status = peewee.CharField(max_length=7, default="pending")
    attempts = peewee.IntegerField(default=0)
    url = peewee.TextField(null=True)
    detail = peewee.TextField(null=True)
    created_at = InstantField()
    waiting_since = InstantField()
    finished_at = InstantField(null=True)

    class Meta:
        table_name = "github_posts"
        indexes = (
            (("repository_id", "created_at", "id"), False),
            (("thread_id", "status", "id"), False),
            (("created_at",), False),
        )


TABLES: tuple[type[Model], ...] = (Repository, Thread, Delivery, Post)
