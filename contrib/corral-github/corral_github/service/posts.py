"""Selects the events that Corral reports on the code host, and builds the text of each comment and review."""

from __future__ import annotations

from typing import Any

import msgspec

from corral import clock
from corral.events.log import LoggedEvent
from corral.ids import new_id
from corral_core.accounts.api import Accounts
from corral_github.models import Post, Thread
from corral_github.service.work_queue import wake
from corral_plugins.code_reviews.api import CodeReviews, CommentFacts

Json = dict[str, Any]
DECISIONS = {"code_review.approved": "approved", "code_review.rejected": "rejected"}
SHOWN_LINES = {
    "approved": ("APPROVE", "Approved"),
    "rejected": ("REQUEST_CHANGES", "Rejected"),
    "changes_requested": ("REQUEST_CHANGES", "Changes requested"),
}
BODY_CHARACTERS = 60_000
MAX_LINE_COMMENTS = 100
MARKER = "<!-- corral-github:"


def queue_comment(thread: Thread, content: Json, *, source: str) -> None:
    """Queue a comment on an issue or a pull request. Runs in the caller's unit of work.

    If a post with the same `source` exists, nothing is queued.
    """
    _queue(thread, "comment", content, source)


def queue_decision(event: LoggedEvent, reviews: CodeReviews, accounts: Accounts) -> None:
    """Queue a pull request review that reports a decision and the unresolved comments."""
    found: Thread | None = Thread.get_or_none(Thread.review_id == event.object_id)
    if found is None:
        return
    told = event.payload()
    person = accounts.get_many([told["by"]]).get(told["by"]) if told["by"] is not None else None
    unresolved = [each for each in reviews.comments(event.object_id) if not each.resolved]
    content = {
        "decision": DECISIONS.get(event.type, "changes_requested"),
        "by": None if person is None else person.full_name,
        "note": told["note"],
        "head_sha": found.heads.get(str(told["revision"])),
        "comments": [_comment(each, told["revision"]) for each in unresolved if each.author_type != "system"],
    }
    _queue(found, "review", content, event.id)


def queue_result(event: LoggedEvent) -> None:
    """Queue a comment that reports the end of a task."""
    found: Thread | None = Thread.get_or_none(Thread.task_id == event.object_id)
    if found is not None:
        _queue(found, "comment", {"task_id": event.object_id, "status": event.payload()["status"]}, event.id)


def _queue(thread: Thread, kind: str, content: Json, source: str) -> None:
    if not wake(thread.id):
        return
    now = clock.now()
    post = Post.insert(
        id=new_id(),
        repository_id=thread.repository_id,
        thread_id=thread.id,
        kind=kind,
        source=source,
        content=content,
        created_at=now,
        waiting_since=now,
    )
    post.on_conflict_ignore().execute()


def _comment(facts: CommentFacts, revision: int) -> Json:
    """Return a review comment in the form in which a post stores it.

    The field `line` is set only if the comment is on a line of the given revision and is not a reply.
    """
    is_placed = facts.anchor == "active" and facts.revision == revision and facts.parent_id is None
    return {
        "path": facts.file,
        "line": facts.end_line if is_placed else None,
        "start_line": facts.line if is_placed and facts.line != facts.end_line else None,
        "side": "LEFT" if facts.side == "old" else "RIGHT",
        "severity": facts.severity,
        "body": facts.body,
        "suggestion": facts.suggestion,
    }


def marker_of(post: Post) -> str:
    """Return the marker that identifies a post on the code host. The marker ends with a random, unpredictable id."""
    return f"{MARKER}{post.id} -->"


def review_forms(post: Post) -> list[Json]:
    """Return up to three versions of a review, best first.

    Several versions are needed because the code host may refuse line comments or an approval. It refuses comments on
    lines that its own diff does not show. If the token's owner opened the pull request, the code host does not let this
    user approve it or request changes, but accepts a review that only comments.
    """
    content = post.content
    event, title = SHOWN_LINES[content["decision"]]
    head = f"**{title}** by {content['by'] or 'a person'} in Corral."
    note = [content["note"]] if content["note"] else []
    placed = [each for each in content["comments"] if each["line"] is not None][:MAX_LINE_COMMENTS]
    rest = [each for each in content["comments"] if each not in placed]
    commit = {"commit_id": content["head_sha"]} if content["head_sha"] else {}
    best = {**commit, "event": event, "body": _body(post, [head, *note, *map(_quoted, rest)])}
    if not placed:
        return [best, {**best, "event": "COMMENT"}]
    whole = _body(post, [head, *note, *map(_quoted, content["comments"])])
    plain = {**commit, "event": event, "body": whole}
    return [{**best, "comments": [_line_comment(each) for each in placed]}, plain, {**plain, "event": "COMMENT"}]


def comment_text(post: Post, text: str) -> str:
    """Return the body of a comment: the text, followed by the marker of the post."""
    return _body(post, [text])


def result_text(task: Any) -> str:
    """Return the text that reports the end of a task. For a completed task, this is the text of the result."""
    if task.status != "completed":
        return "The agent could not complete the task."
    result = task.result
    if isinstance(result, dict) and isinstance(result.get("text"), str) and result["text"].strip():
        return str(result["text"])
    if result in (None, {}, ""):
        return "The agent completed the task, but returned no text."
    return f"```json\n{msgspec.json.format(msgspec.json.encode(result), indent=2).decode()}\n```"


def _body(post: Post, parts: list[str]) -> str:
    text = "\n\n".join(parts).replace("<!--", "&lt;!--")
    if len(text) > BODY_CHARACTERS:
        text = f"{text[:BODY_CHARACTERS]}\n\n… (shortened)"
    return f"{text}\n\n{marker_of(post)}"


def _line_comment(comment: Json) -> Json:
    made = {"path": comment["path"], "line": comment["line"], "side": comment["side"], "body": _comment_body(comment)}
    if comment["start_line"] is not None:
        made |= {"start_line": comment["start_line"], "start_side": comment["side"]}
    return made


def _comment_body(comment: Json) -> str:
    shown = f"**{comment['severity']}**: {comment['body']}" if comment["severity"] != "info" else comment["body"]
    if comment["suggestion"] and comment["side"] == "RIGHT":
        shown += f"\n\n```suggestion\n{comment['suggestion']}\n```"
    return str(shown).replace("<!--", "&lt;!--")[:BODY_CHARACTERS]


def _quoted(comment: Json) -> str:
    """Return the text of a comment, preceded by its file and line, for use in the body of the review."""
    place = f"`{comment['path']}`" if comment["path"] else ""
    if place and comment["line"] is not None:
        place += f" line {comment['line']}"
    return f"{place}: {_comment_body(comment)}" if place else _comment_body(comment)
