"""The tools that agents use to propose diffs and to comment on other agents' diffs."""

from __future__ import annotations

from typing import Any

import msgspec

from corral.database.unit import UnitContext
from corral.errors import NotFound
from corral.schema.conversion import convert
from corral_plugins.code_reviews.api import NewReview
from corral_plugins.code_reviews.service import rows
from corral_plugins.code_reviews.service.comments import ReviewComments
from corral_plugins.code_reviews.service.opening import CodeReviewsService
from corral_plugins.code_reviews.service.patch_preparation import ReviewContents
from corral_plugins.code_reviews.shapes import NewReviewComment
from corral_plugins.tools.api import Json, Tool, ToolContext, ToolFailure

PATCH_CHARACTERS = 256 * 1024
TEXT = {"type": "string", "minLength": 1, "maxLength": 500}
PROPOSE_SCHEMA: Json = {
    "type": "object",
    "properties": {
        "title": {
            "type": "string",
            "minLength": 1,
            "maxLength": 200,
            "description": "A title that says what the diff does.",
        },
        "description": {
            "type": "string",
            "maxLength": 16384,
            "description": "The reasons for the change, and what reviewers should check.",
        },
        "patch": {
            "type": "string",
            "minLength": 1,
            "maxLength": PATCH_CHARACTERS,
            "description": "The unified diff, as git diff prints it.",
        },
        "repo": {**TEXT, "description": "The repository."},
        "base_ref": {**TEXT, "description": "The branch or commit that the diff applies to."},
        "head_ref": {**TEXT, "description": "The branch with the change."},
    },
    "required": ["title", "patch"],
    "additionalProperties": False,
}
COMMENT_SCHEMA: Json = {
    "type": "object",
    "properties": {
        "review_id": {"type": "string", "format": "uuid", "description": "The review to comment on."},
        "body": {"type": "string", "minLength": 1, "maxLength": 16384, "description": "The comment."},
        "file": {"type": "string", "minLength": 1, "maxLength": 4096, "description": "A file that the diff changes."},
        "line": {"type": "integer", "minimum": 1, "description": "A line that the diff shows."},
        "end_line": {
            "type": "integer",
            "minimum": 1,
            "description": "The last line, if the comment is about several lines.",
        },
        "side": {"enum": ["old", "new"], "description": "Whether the line is from before or after the change."},
        "severity": {"enum": ["info", "suggestion", "issue", "blocker"]},
        "suggestion": {
            "type": "string",
            "maxLength": 16384,
            "description": "The text that should replace the lines that the comment is about.",
        },
    },
    "required": ["review_id", "body"],
    "additionalProperties": False,
}


class AgentReviews:
    """Implements the code review tools. Agents propose diffs only for the task that they are working on."""

    def __init__(self, contents: ReviewContents, reviews: CodeReviewsService, comments: ReviewComments) -> None:
        self._contents, self._reviews, self._comments = contents, reviews, comments

    async def propose(self, context: ToolContext, arguments: Json) -> Json:
        """Open a review of a diff, or add a revision to the task's review if changes were requested."""
        caller = context.caller
        given = {**arguments, "agent_id": caller.agent_id, "task_id": context.task_id}
        new = convert(NewReview, given, pointer_prefix="")
        patch = await self._contents.of_request(new.patch, new.file_id, by=caller, is_marked=True)
        entry = UnitContext(label="tool code_review.propose", actor=caller.actor)
        row = await context.work(lambda: self._reviews.propose(new, patch, by=caller), entry=entry)
        return {"review_id": row.id, "revision": row.revision, "status": row.status, "stats": row.stats}

    async def comment(self, context: ToolContext, arguments: Json) -> Json:
        """Add a comment by the agent to a review."""
        given = {name: value for name, value in arguments.items() if name != "review_id"}
        new = convert(NewReviewComment, given, pointer_prefix="")
        entry = UnitContext(label="tool code_review.comment", actor=context.caller.actor)
        made = await self._comments.add(arguments["review_id"], new, by=context.caller, entry=entry)
        found: Json = msgspec.to_builtins({"comment_id": made.id, "anchor": made.anchor})
        return found

    def is_visible(self, context: ToolContext, arguments: Json) -> bool:
        """Return whether the caller of the tool may read the review named in the arguments."""
        try:
            rows.find_readable(arguments["review_id"], context.caller)
        except NotFound:
            return False
        return True


class ReviewTools:
    """The tools that the plugin contributes.

    The plugin creates this object before its services exist, and sets `implementation` later.
    """

    implementation: AgentReviews | None = None

    def all(self) -> list[Tool]:
        """Return all tools."""

        async def propose(context: ToolContext, arguments: Json) -> Any:
            return await self._require_service().propose(context, arguments)

        async def comment(context: ToolContext, arguments: Json) -> Any:
            return await self._require_service().comment(context, arguments)

        return [
            Tool(
                name="code_review.comment",
                title="Comment on a diff",
                description="Comment on a code review, or on lines of its diff. People decide the outcome of the "
                "review.",
                risk="write",
                schema=COMMENT_SCHEMA,
                permission="code_reviews.write",
                is_visible=lambda context, arguments: self._require_service().is_visible(context, arguments),
                run=comment,
            ),
            Tool(
                name="code_review.propose",
                title="Propose a diff",
                description="Ask people to review a diff. If people sent back an earlier diff of the task, the new "
                "diff becomes the next revision of that review.",
                risk="write",
                schema=PROPOSE_SCHEMA,
                permission="code_reviews.write",
                run=propose,
            ),
        ]

    def _require_service(self) -> AgentReviews:
        if self.implementation is None:
            raise ToolFailure("unavailable", "The server is starting; try again.")
        return self.implementation
