"""The HTTP routes for code reviews."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator

from msgspec import UNSET

from corral.auth.principal import Principal
from corral.database.engine import Work
from corral.errors import NotFound
from corral.http.answers import Answer, IfMatch, Request, Stream
from corral.http.page import Page
from corral.http.routes import MIB, Routes
from corral_plugins.code_reviews.api import NewReview
from corral_plugins.code_reviews.service import rows
from corral_plugins.code_reviews.service.comments import ReviewComments
from corral_plugins.code_reviews.service.decisions import ReviewDecisions
from corral_plugins.code_reviews.service.interdiffs import interdiff
from corral_plugins.code_reviews.service.listing import ReviewListing
from corral_plugins.code_reviews.service.opening import CodeReviewsService
from corral_plugins.code_reviews.service.patch_preparation import ReviewContents, patch_of
from corral_plugins.code_reviews.shapes import (
    ApproveReview,
    DiffQuery,
    EditedReviewComment,
    NewReviewComment,
    NewRevision,
    RejectReview,
    RequestChanges,
    ReviewCommentView,
    ReviewItem,
    ReviewPatch,
    ReviewQuery,
    ReviewView,
)

READ, WRITE, DECIDE = "code_reviews.read", "code_reviews.write", "code_reviews.decide"
CHANGES = ("already_decided", "precondition_failed")
PATCH_BODY = 4 * MIB
CHUNK = 64 * 1024

routes = Routes("/code-reviews", tag="Code Reviews")


@routes.get("/", needs=READ, raises=("invalid_cursor",))
def list_code_reviews(query: ReviewQuery, listing: ReviewListing, caller: Principal) -> Page[ReviewItem]:
    """List code reviews, newest first, without their files and comments."""
    return listing.list_reviews(query, caller)


@routes.post(
    "/",
    needs=WRITE,
    status=201,
    body_limit=PATCH_BODY,
    delegable=True,
    redacted=True,
    raises=("payload_too_large", "unknown_reference"),
)
async def create_code_review(
    body: NewReview,
    contents: ReviewContents,
    reviews: CodeReviewsService,
    listing: ReviewListing,
    caller: Principal,
    request: Request,
    work: Work,
) -> ReviewView:
    """Open a review of an agent's diff. An older open review of the same task is superseded."""
    patch = await contents.of_request(body.patch, body.file_id, by=caller, is_marked=True)
    return await work(
        lambda: listing.view_of(reviews.open_prepared(body, patch, by=caller)), entry=request.unit_context(caller)
    )


@routes.get("/{id}", needs=READ)
def get_code_review(id: str, listing: ReviewListing, caller: Principal) -> ReviewView:
    """Get a review with its comments, oldest first, and with the files of its diff."""
    return listing.get(id, caller)


@routes.patch("/{id}", needs=WRITE, redacted=True, raises=CHANGES)
def update_code_review(
    id: str, body: ReviewPatch, decisions: ReviewDecisions, match: IfMatch, caller: Principal
) -> ReviewView:
    """Change the title, the description, the reviewers or the checks of an open review."""
    return decisions.patch(id, body, match, by=caller)


@routes.get("/{id}/diff", needs=READ, live=True)
async def get_code_review_diff(
    id: str, query: DiffQuery, contents: ReviewContents, caller: Principal, work: Work
) -> Stream:
    """Download the diff of a revision, byte for byte. With `against`, download the changes between two revisions."""
    current = await work(lambda: rows.find_readable(id, caller).revision, read=True)
    number = current if query.revision is UNSET else query.revision
    if query.against is UNSET:
        data = await work(functools.partial(patch_of, id.lower(), number), read=True)
    else:
        after, before = [await contents.parsed(id.lower(), each) for each in (number, query.against)]
        data = None if before is None or after is None else await asyncio.to_thread(interdiff, before, after)
    if data is None:
        raise NotFound("The review has no revision with this number.")
    return Stream(_chunks(data), media_type="text/x-diff")


async def _chunks(data: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(data), CHUNK):
        yield data[start : start + CHUNK]


@routes.post(
    "/{id}/revisions",
    needs=WRITE,
    body_limit=PATCH_BODY,
    delegable=True,
    redacted=True,
    raises=(*CHANGES, "payload_too_large", "unknown_reference"),
)
async def create_code_review_revision(
    id: str,
    body: NewRevision,
    contents: ReviewContents,
    reviews: CodeReviewsService,
    listing: ReviewListing,
    match: IfMatch,
    caller: Principal,
    request: Request,
    work: Work,
) -> ReviewView:
    """Add a revision to an open review, which becomes pending again.

    Comments move to their lines in the new revision.
    """
    patch = await contents.of_request(body.patch, body.file_id, by=caller, is_marked=True)
    return await work(
        lambda: listing.view_of(reviews.revise_prepared(id, patch, body.note, match, by=caller)),
        entry=request.unit_context(caller),
    )


@routes.post(
    "/{id}/approve",
    needs=DECIDE,
    own_session=True,
    redacted=True,
    raises=(*CHANGES, "self_approval", "invalid_state"),
)
def approve_code_review(
    id: str, body: ApproveReview, decisions: ReviewDecisions, match: IfMatch, caller: Principal
) -> ReviewView:
    """Approve the current diff. A task that waits for the review completes."""
    return decisions.approve(id, body, match, by=caller)


@routes.post("/{id}/reject", needs=DECIDE, own_session=True, redacted=True, raises=(*CHANGES, "invalid_state"))
def reject_code_review(
    id: str, body: RejectReview, decisions: ReviewDecisions, match: IfMatch, caller: Principal
) -> ReviewView:
    """Reject the diff or, with `request_changes`, send it back to the agent."""
    return decisions.reject(id, body, match, by=caller)


@routes.post("/{id}/request-changes", needs=DECIDE, own_session=True, redacted=True, raises=(*CHANGES, "invalid_state"))
def request_code_review_changes(
    id: str, body: RequestChanges, decisions: ReviewDecisions, match: IfMatch, caller: Principal
) -> ReviewView:
    """Send the diff back to the agent with all unresolved comments in one batch."""
    return decisions.request_changes(id, body.reason, match, by=caller)


@routes.post("/{id}/cancel", needs=WRITE, raises=CHANGES)
def cancel_code_review(id: str, decisions: ReviewDecisions, match: IfMatch, caller: Principal) -> ReviewView:
    """Withdraw an open review. A task that waits for the review fails."""
    return decisions.cancel(id, match, by=caller)


@routes.post("/{id}/comment", needs=WRITE, status=201, redacted=True, raises=("unknown_reference", "quota_exceeded"))
async def comment_on_code_review(
    id: str, body: NewReviewComment, comments: ReviewComments, caller: Principal, request: Request
) -> Answer[ReviewCommentView]:
    """Comment on a review, on a file, or on lines that the diff of the current revision contains."""
    made = await comments.add(id, body, by=caller, entry=request.unit_context(caller))
    return Answer(body=made, status=201)


@routes.put("/{id}/comments/{comment_id}", needs=WRITE, redacted=True, raises=("quota_exceeded",))
def edit_code_review_comment(
    id: str, comment_id: str, body: EditedReviewComment, comments: ReviewComments, caller: Principal
) -> ReviewCommentView:
    """Change the text of your own comment."""
    return comments.edit(id, comment_id, body.body, by=caller)


@routes.post("/{id}/comments/{comment_id}/resolve", needs=WRITE)
def resolve_code_review_comment(
    id: str, comment_id: str, comments: ReviewComments, caller: Principal
) -> ReviewCommentView:
    """Resolve a comment thread."""
    return comments.resolve(id, comment_id, resolved=True, by=caller)


@routes.post("/{id}/comments/{comment_id}/reopen", needs=WRITE)
def reopen_code_review_comment(
    id: str, comment_id: str, comments: ReviewComments, caller: Principal
) -> ReviewCommentView:
    """Reopen a comment thread."""
    return comments.resolve(id, comment_id, resolved=False, by=caller)
