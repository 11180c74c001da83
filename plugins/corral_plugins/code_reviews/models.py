"""The tables for code reviews. Only the service layer of this plugin writes to them."""

from __future__ import annotations

import peewee

from corral.database.model import SHARED, IdField, InstantField, JSONField, Model


class BytesField(peewee.Field):
    """A column for bytes. Peewee's own `BlobField` needs a database when the model classes are defined."""

    field_type = "BLOB"

    def python_value(self, value: bytes | memoryview | None) -> bytes | None:
        return None if value is None else bytes(value)


class Review(Model):
    """A review, in which people approve or reject a diff.

    `owner_id` is the person who opened the review or, if an agent opened it, the person for whom the agent works.
    `is_awaited` is true if the task waits for the decision, or is running again because of the decision. While
    it is false, the task may have a run in progress that was not told that changes were requested. `is_tainted` means
    that a revision came from outside the installation or from a tainted run. `stats` is `{files, additions,
    deletions}`.
    """

    visibility = SHARED
    owner_field = "owner_id"

    id = IdField(primary_key=True)
    version = peewee.IntegerField(default=1)
    revision = peewee.IntegerField(default=1)
    title = peewee.CharField(max_length=200)
    description = peewee.TextField(default="")
    owner_id = IdField(null=True)
    agent_id = IdField()
    task_id = IdField(null=True)
    run_id = IdField(null=True)
    is_awaited = peewee.BooleanField(default=False)
    is_tainted = peewee.BooleanField(default=False)
    repo = peewee.CharField(max_length=500, null=True)
    base_ref = peewee.CharField(max_length=500, null=True)
    head_ref = peewee.CharField(max_length=500, null=True)
    patch_sha256 = peewee.CharField(max_length=64)
    stats = JSONField()
    checks = JSONField(default=list)
    round = peewee.IntegerField(default=0)
    status = peewee.CharField(max_length=20, default="pending")
    decided_by = IdField(null=True)
    decided_at = InstantField(null=True)
    decision_note = peewee.TextField(null=True)
    reminded_at = InstantField()
    created_at = InstantField()
    updated_at = InstantField()

    class Meta:
        table_name = "code_reviews_reviews"
        indexes = (
            (("created_at", "id"), False),
            (("status", "created_at", "id"), False),
            (("agent_id", "created_at", "id"), False),
            (("task_id", "created_at", "id"), False),
        )


IS_PENDING = peewee.SQL("status = 'pending'")
"""The SQL condition for reviews that wait for a decision.

The status is a literal, because query planners do not use a partial index for a condition with parameters.
"""

Review.add_index(Review.index(Review.reminded_at, name="code_reviews_reviews_remind", where=IS_PENDING))


class Revision(Model):
    """One version of a review's diff.

    `patch` is stored byte for byte, and `files` is the parsed list of changed files.
    """

    review_id = IdField()
    number = peewee.IntegerField()
    patch = BytesField()
    patch_sha256 = peewee.CharField(max_length=64)
    files = JSONField()
    note = peewee.TextField(default="")
    created_by = IdField(null=True)
    created_at = InstantField()

    class Meta:
        table_name = "code_reviews_revisions"
        primary_key = peewee.CompositeKey("review_id", "number")


class Reviewer(Model):
    """A person (`kind` is `user`) or an agent (`agent`) who was asked to review.

    `position` is their place in the list of reviewers.
    """

    reviewer_id = IdField()
    review_id = IdField()
    kind = peewee.CharField(max_length=5)
    required = peewee.BooleanField(default=False)
    state = peewee.CharField(max_length=10, default="pending")
    position = peewee.SmallIntegerField()

    class Meta:
        table_name = "code_reviews_reviewers"
        primary_key = peewee.CompositeKey("reviewer_id", "review_id")
        indexes = ((("review_id", "position"), False),)


class ReviewComment(Model):
    """A comment on a review. A comment with a `parent_id` is a reply to the first comment of its thread.

    `line` and `end_line` are line numbers in `revision`. `context` is the text of these lines and of the lines around
    them.
    """

    visibility = SHARED

    id = IdField(primary_key=True)
    review_id = IdField()
    parent_id = IdField(null=True)
    body = peewee.TextField()
    file = peewee.TextField(null=True)
    line = peewee.IntegerField(null=True)
    end_line = peewee.IntegerField(null=True)
    side = peewee.CharField(max_length=3, default="new")
    severity = peewee.CharField(max_length=10, default="info")
    suggestion = peewee.TextField(null=True)
    author_type = peewee.CharField(max_length=6)
    author_id = IdField()
    revision = peewee.IntegerField()
    anchor = peewee.CharField(max_length=8)
    context = JSONField(null=True)
    edited = peewee.BooleanField(default=False)
    resolved = peewee.BooleanField(default=False)
    resolved_by = IdField(null=True)
    created_at = InstantField()
    updated_at = InstantField()

    class Meta:
        table_name = "code_reviews_comments"
        indexes = ((("review_id", "created_at", "id"), False),)


TABLES: tuple[type[Model], ...] = (Review, Revision, Reviewer, ReviewComment)
