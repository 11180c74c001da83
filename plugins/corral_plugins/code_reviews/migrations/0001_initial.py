"""Creates the tables. The classes are frozen copies of the models in the first release."""

from __future__ import annotations

from typing import Any

import peewee
from peewee import SQL, Model


def up(migrator: Any, db: Any) -> None:
    class Base(Model):
        class Meta:
            database = db
            legacy_table_names = False

    class Review(Base):
        id = peewee.CharField(max_length=36, primary_key=True)
        version = peewee.IntegerField()
        revision = peewee.IntegerField()
        title = peewee.CharField(max_length=200)
        description = peewee.TextField()
        owner_id = peewee.CharField(max_length=36, null=True)
        agent_id = peewee.CharField(max_length=36)
        task_id = peewee.CharField(max_length=36, null=True)
        run_id = peewee.CharField(max_length=36, null=True)
        is_awaited = peewee.BooleanField()
        repo = peewee.CharField(max_length=500, null=True)
        base_ref = peewee.CharField(max_length=500, null=True)
        head_ref = peewee.CharField(max_length=500, null=True)
        patch_sha256 = peewee.CharField(max_length=64)
        stats = peewee.TextField()
        checks = peewee.TextField()
        round = peewee.IntegerField()
        status = peewee.CharField(max_length=20)
        decided_by = peewee.CharField(max_length=36, null=True)
        decided_at = peewee.CharField(max_length=24, null=True)
        decision_note = peewee.TextField(null=True)
        reminded_at = peewee.CharField(max_length=24)
        created_at = peewee.CharField(max_length=24)
        updated_at = peewee.CharField(max_length=24)

        class Meta:
            table_name = "code_reviews_reviews"
            indexes = (
                (("created_at", "id"), False),
                (("status", "created_at", "id"), False),
                (("agent_id", "created_at", "id"), False),
                (("task_id", "created_at", "id"), False),
            )

    class Revision(Base):
        review_id = peewee.CharField(max_length=36)
        number = peewee.IntegerField()
        patch = peewee.BlobField()
        patch_sha256 = peewee.CharField(max_length=64)
        files = peewee.TextField()
        note = peewee.TextField()
        created_by = peewee.CharField(max_length=36, null=True)
        created_at = peewee.CharField(max_length=24)

        class Meta:
            table_name = "code_reviews_revisions"
            primary_key = peewee.CompositeKey("review_id", "number")

    class Reviewer(Base):
        reviewer_id = peewee.CharField(max_length=36)
        review_id = peewee.CharField(max_length=36)
        kind = peewee.CharField(max_length=5)
        required = peewee.BooleanField()
        state = peewee.CharField(max_length=10)
        position = peewee.SmallIntegerField()

        class Meta:
            table_name = "code_reviews_reviewers"
            primary_key = peewee.CompositeKey("reviewer_id", "review_id")
            indexes = ((("review_id", "position"), False),)

    class ReviewComment(Base):
        id = peewee.CharField(max_length=36, primary_key=True)
        review_id = peewee.CharField(max_length=36)
        parent_id = peewee.CharField(max_length=36, null=True)
        body = peewee.TextField()
        file = peewee.TextField(null=True)
        line = peewee.IntegerField(null=True)
        end_line = peewee.IntegerField(null=True)
        side = peewee.CharField(max_length=3)
        severity = peewee.CharField(max_length=10)
        suggestion = peewee.TextField(null=True)
        author_type = peewee.CharField(max_length=6)
        author_id = peewee.CharField(max_length=36)
        revision = peewee.IntegerField()
        anchor = peewee.CharField(max_length=8)
        context = peewee.TextField(null=True)
        edited = peewee.BooleanField()
        resolved = peewee.BooleanField()
        resolved_by = peewee.CharField(max_length=36, null=True)
        created_at = peewee.CharField(max_length=24)
        updated_at = peewee.CharField(max_length=24)

        class Meta:
            table_name = "code_reviews_comments"
            indexes = ((("review_id", "created_at", "id"), False),)

    pending = SQL("status = 'pending'")
    Review.add_index(Review.index(Review.reminded_at, name="code_reviews_reviews_remind", where=pending))
    db.create_tables([Review, Revision, Reviewer, ReviewComment])
