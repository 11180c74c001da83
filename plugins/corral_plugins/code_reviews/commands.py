"""`corral reviews`: show code reviews and decide on them in a terminal."""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any, get_args

import click

from corral.cli.api_client import ApiClient, ApiClientError
from corral.cli.object_lookup import ObjectNames, find_user_id
from corral.cli.output import print_fields, print_table
from corral.cli.server_connection import client_command
from corral.ids import parse_id
from corral_core.accounts.api import USERS_PATH
from corral_plugins.code_reviews.api import OPEN, ReviewStatus
from corral_plugins.code_reviews.shapes import Severity, Side

COLUMNS = ("title", "status", "agent", "revision", "round", "changes", "created_at", "id")
SHA256 = re.compile(r"[0-9a-fA-F]{64}")
COLOURS = {"+": "green", "-": "red", "@": "cyan"}

review_argument = click.argument("review")
patch_argument = click.argument("patch", type=click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path))


@click.group("reviews")
def reviews_command_group() -> None:
    """Read agents' diffs, comment on them, and approve or reject them. REVIEW is an id or a title.

    If several reviews have the same title, the open one is used. If none is open, `show` and `diff` use the newest.
    """


@reviews_command_group.command("list")
@click.option(
    "--status",
    type=click.Choice(get_args(ReviewStatus)),
    multiple=True,
    help="list only reviews with this status; repeatable",
)
@click.option("--mine", is_flag=True, help="list only reviews in which you are a reviewer")
@click.option("--task", metavar="TASK", help="list only reviews of this task, by title or id")
@click.option(
    "--limit", type=click.IntRange(1, 200), default=50, show_default=True, help="maximum number of reviews to list"
)
@client_command
def list_reviews(
    client: ApiClient, *, status: tuple[str, ...], mine: bool, task: str | None, limit: int, as_json: bool
) -> None:
    """List code reviews, newest first."""
    query: dict[str, Any] = {"limit": limit, "status": list(status)}
    query["task_id"] = _task_id(client, task) if task is not None else None
    names = ObjectNames(client)
    query["reviewer"] = "me" if mine else None
    found = client.get("/code-reviews", **{name: value for name, value in query.items() if value})
    print_table(
        found["items"],
        COLUMNS,
        as_json=as_json,
        empty="There are no such code reviews.",
        colour_of="status",
        computed={
            "agent": lambda review: names.name("/agents", review["agent_id"]),
            "changes": lambda review: _change_counts(review["stats"]),
        },
    )


@reviews_command_group.command("show")
@review_argument
@client_command
def show_review(client: ApiClient, *, review: str, as_json: bool) -> None:
    """Show a review, its files, and the comments that are not attached to a line. `diff` shows the changed lines."""
    found, names = _find(client, review, decided=True), ObjectNames(client)
    task = f"{names.name('/tasks', found['task_id'], 'title')} ({found['task_id']})" if found["task_id"] else None
    shown = {
        "title": found["title"],
        "id": found["id"],
        "status": found["status"],
        "revision": found["revision"],
        "round": found["round"],
        "agent": names.name("/agents", found["agent_id"]),
        "task": task,
        "repository": found["repo"],
        "from": found["head_ref"],
        "to": found["base_ref"],
        "description": found["description"],
        "hash": found["patch_sha256"],
        "changes": _change_counts(found["stats"]),
        "files": "\n".join(map(_file_text, found["files"])),
        "reviewers": "\n".join(_reviewer_text(names, each) for each in found["reviewers"]),
        "revisions": "\n".join(map(_revision_text, found["revisions"])) if found["revision"] > 1 else None,
        "checks": "\n".join(f"{each['name']}: {each['status']}" for each in found["checks"]),
        "open blockers": found["open_blockers"] or None,
        "decided by": names.user(USERS_PATH, found["decided_by"]) if found["decided_by"] else None,
        "note": found["decision_note"],
        "comments": "\n".join(_comment_text(names, each) for each in found["comments"]),
    }
    print_fields(found, shown, as_json=as_json)


@reviews_command_group.command("diff")
@review_argument
@click.option("--revision", type=int, help="revision to show (default: the current revision)")
@click.option("--against", type=int, help="show the changes since this revision")
@click.option("--raw", is_flag=True, help="print the diff unchanged, for example as input for git apply")
@client_command
def show_diff(
    client: ApiClient, *, review: str, revision: int | None, against: int | None, raw: bool, as_json: bool
) -> None:
    """Show the diff of a review in colour, with comments below the lines that they refer to."""
    found = _find(client, review, decided=True)
    query = {name: value for name, value in (("revision", revision), ("against", against)) if value is not None}
    data = b"".join(client.download(f"/code-reviews/{found['id']}/diff", **query))
    if raw:
        sys.stdout.buffer.write(data)
        return
    text = data.decode(errors="replace")
    if as_json:
        click.echo(json.dumps({"revision": revision or found["revision"], "diff": text, "comments": found["comments"]}))
        return
    shows_current = against is None and revision in (None, found["revision"])
    _print_diff(ObjectNames(client), text, found if shows_current else {**found, "comments": []})


@reviews_command_group.command("open")
@click.argument("title")
@patch_argument
@click.option("--agent", required=True, help="name or id of the agent that made the diff")
@click.option("--task", metavar="TASK", help="task in which the agent made the diff, by title or id")
@click.option("--description", default="", help="description for the reviewers")
@click.option("--reviewer", multiple=True, metavar="EMAIL|ID", help="email address or id of a reviewer; repeatable")
@client_command
def open_review(
    client: ApiClient,
    *,
    title: str,
    patch: Path,
    agent: str,
    task: str | None,
    description: str,
    reviewer: tuple[str, ...],
    as_json: bool,
) -> None:
    """Open a review of the diff in the file PATCH (- for standard input)."""
    body: dict[str, Any] = {"title": title, "patch": _read_patch(patch), "description": description}
    body["agent_id"] = client.find("/agents", agent, kind="agent")["id"]
    body["reviewers"] = [{"user_id": find_user_id(client, USERS_PATH, each)} for each in reviewer]
    if task is not None:
        body["task_id"] = _task_id(client, task)
    _print_review(client.post("/code-reviews", body), as_json=as_json)


@reviews_command_group.command("revise")
@review_argument
@patch_argument
@click.option("--note", default="", help="note that tells the reviewers what changed")
@client_command
def revise_review(client: ApiClient, *, review: str, patch: Path, note: str, as_json: bool) -> None:
    """Add the diff in the file PATCH to a review as a new revision."""
    _act(client, _find(client, review), "revisions", {"patch": _read_patch(patch), "note": note}, as_json=as_json)


@reviews_command_group.command("approve")
@review_argument
@click.option("--note", help="note for the requester")
@click.option("--sha256", help="SHA-256 of the diff that you read (default: the SHA-256 of the current diff)")
@click.option("--force", is_flag=True, help="approve the diff despite open blockers (admins only)")
@client_command
def approve_review(
    client: ApiClient, *, review: str, note: str | None, sha256: str | None, force: bool, as_json: bool
) -> None:
    """Approve the current diff of a review."""
    if sha256 is not None and not SHA256.fullmatch(sha256):
        raise click.UsageError(
            f"--sha256 {sha256} is not a SHA-256 hash of 64 hexadecimal digits; `corral reviews show` prints the hash"
        )
    found = _find(client, review)
    if found["status"] == "changes_requested":
        raise ApiClientError(
            f"changes to {found['title']} were requested; wait for the agent's next revision, or upload one yourself: "
            f"corral reviews revise {found['id']} PATCH"
        )
    body = {"note": note, "patch_sha256": sha256.lower() if sha256 else found["patch_sha256"], "force": force}
    try:
        _act(client, found, "approve", body, as_json=as_json)
    except ApiClientError as error:
        if not error.problem.get("open_blockers"):
            raise
        raise ApiClientError(f"{error}\n{_blockers_text(client, found)}", error.status, error.problem) from None


@reviews_command_group.command("reject")
@review_argument
@click.option("--reason", help="reason for the rejection, used as the error message of the failed task")
@client_command
def reject_review(client: ApiClient, *, review: str, reason: str | None, as_json: bool) -> None:
    """Reject the diff of a review. A task that waits for the review fails."""
    _act(client, _find(client, review), "reject", {"reason": reason}, as_json=as_json)


@reviews_command_group.command("request-changes")
@review_argument
@click.option("--reason", help="message that the agent reads before the comments")
@client_command
def request_changes(client: ApiClient, *, review: str, reason: str | None, as_json: bool) -> None:
    """Send the diff of a review back to the agent, with all unresolved comments."""
    _act(client, _find(client, review), "request-changes", {"reason": reason}, as_json=as_json)


@reviews_command_group.command("cancel")
@review_argument
@client_command
def cancel_review(client: ApiClient, *, review: str, as_json: bool) -> None:
    """Withdraw a review. A task that waits for the review fails."""
    _act(client, _find(client, review), "cancel", {}, as_json=as_json)


@reviews_command_group.command("comment")
@review_argument
@click.argument("text")
@click.option(
    "--at",
    metavar="FILE[:LINE[-LINE]]",
    help="file to comment on, optionally with a line or a range of lines of the diff",
)
@click.option(
    "--side",
    type=click.Choice(get_args(Side)),
    default="new",
    show_default=True,
    help="side of the diff to which the lines belong",
)
@click.option(
    "--severity",
    type=click.Choice(get_args(Severity)),
    default="info",
    show_default=True,
    help="severity of the comment",
)
@click.option("--suggestion", help="suggested replacement for the lines that the comment is about")
@click.option("--reply-to", help="comment to reply to, identified by its id or the beginning of its text")
@client_command
def comment_on_review(
    client: ApiClient,
    *,
    review: str,
    text: str,
    at: str | None,
    side: str,
    severity: str,
    suggestion: str | None,
    reply_to: str | None,
    as_json: bool,
) -> None:
    """Comment on a review, for example with --at src/app.py:12-14 --severity blocker."""
    body: dict[str, Any] = {"body": text, "side": side, "severity": severity, "suggestion": suggestion}
    found = _find(client, review)
    body |= {"parent_id": _comment_id(found, reply_to)} if reply_to else {}
    body |= _parse_position(at) if at else {}
    made = client.post(f"/code-reviews/{found['id']}/comment", body)
    click.echo(json.dumps(made, indent=2, ensure_ascii=False) if as_json else f"Commented: {made['id']}.")


@reviews_command_group.command("resolve")
@review_argument
@click.argument("comment")
@click.option("--reopen", is_flag=True, help="reopen the thread instead of resolving it")
@client_command
def resolve_comment(client: ApiClient, *, review: str, comment: str, reopen: bool, as_json: bool) -> None:
    """Resolve or reopen a comment thread. COMMENT is the id of a comment or the beginning of its text."""
    action, found = "reopen" if reopen else "resolve", _find(client, review)
    made = client.post(f"/code-reviews/{found['id']}/comments/{_comment_id(found, comment)}/{action}", {})
    told = "resolved" if made["resolved"] else "open"
    click.echo(json.dumps(made, indent=2, ensure_ascii=False) if as_json else f"The thread is {told}.")


def _blockers_text(client: ApiClient, review: dict[str, Any]) -> str:
    """Return text that lists the open blockers of a review, followed by the command that resolves a blocker."""
    names, now = ObjectNames(client), client.get(f"/code-reviews/{review['id']}")
    blockers = [each for each in now["comments"] if each["severity"] == "blocker" and not each["resolved"]]
    shown = "\n".join(_comment_text(names, each) for each in blockers)
    return f"{shown}\nResolve one: corral reviews resolve {review['id']} COMMENT"


def _comment_id(review: dict[str, Any], comment: str) -> str:
    """Return the id of a comment.

    `comment` is the id itself or the beginning of the comment's text, which must match exactly one comment.
    """
    if parse_id(comment) is not None:
        return comment
    begin = comment.strip().casefold()
    alike = [each["id"] for each in review["comments"] if each["body"].casefold().startswith(begin)]
    if len(alike) == 1:
        return str(alike[0])
    problem = f"{len(alike)} comments begin with {comment}" if alike else f"no comment begins with {comment}"
    raise ApiClientError(f"{problem}; `corral reviews show {review['id']}` shows the ids of all comments")


def _find(client: ApiClient, review: str, *, decided: bool = False) -> dict[str, Any]:
    """Return the review with this id, or the open review with this title.

    With `decided`, return the newest review with this title if none is open.
    """
    if parse_id(review) is not None:
        with client.explain_not_found("code review", review, "corral reviews list"):
            return dict(client.get(f"/code-reviews/{review}"))
    wanted = review.strip().casefold()
    alike = client.pages("/code-reviews", search=review.strip()[:200])
    all_of_title = [each for each in alike if each["title"].casefold() == wanted]
    found = [each for each in all_of_title if each["status"] in OPEN]
    if not found and all_of_title:
        newest = all_of_title[0]
        if not decided:
            problem = f"the code review {newest['title']} ({newest['id']}) is {newest['status']}"
            raise ApiClientError(f"{problem}; `corral reviews show {newest['id']}` shows the decision")
        found = [newest]
    if not found:
        problem = f"there is no code review with the title {review} at {client.url}"
        raise ApiClientError(f"{problem}; `corral reviews list` shows all reviews", 404)
    if len(found) > 1:
        ids = ", ".join(each["id"] for each in found)
        raise ApiClientError(
            f"{len(found)} open code reviews have the title {review}; give one of these ids instead: {ids}"
        )
    return dict(client.get(f"/code-reviews/{found[0]['id']}"))


def _revision_text(revision: Any) -> str:
    note = f": {revision['note']}" if revision["note"] else ""
    return f"{revision['revision']}, {revision['created_at']}{note}"


def _task_id(client: ApiClient, task: str) -> str:
    return str(client.find("/tasks", task, kind="task", field="title")["id"])


def _act(client: ApiClient, found: dict[str, Any], action: str, body: dict[str, Any], *, as_json: bool) -> None:
    given = {name: value for name, value in body.items() if value is not None}
    _print_review(client.post(f"/code-reviews/{found['id']}/{action}", given), as_json=as_json)


def _print_review(review: Any, *, as_json: bool) -> None:
    status = review["status"].replace("_", " ")
    told = f"{review['title']} ({review['id']}) is {status} at revision {review['revision']}."
    click.echo(json.dumps(review, indent=2, ensure_ascii=False) if as_json else told)


def _read_patch(path: Path) -> str:
    data = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise click.ClickException(
            f"{path} is not UTF-8; upload the file with `corral files upload` and use its file_id"
        ) from None


def _parse_position(at: str) -> dict[str, Any]:
    """Parse `FILE`, `FILE:LINE` or `FILE:LINE-LINE` into the position fields of a comment."""
    file, _, lines = at.rpartition(":")
    first, _, last = lines.partition("-")
    if not file or not first.isdigit() or not (last.isdigit() or not last):
        return {"file": at}
    return {"file": file, "line": int(first), "end_line": int(last or first)}


def _print_diff(names: ObjectNames, text: str, review: dict[str, Any]) -> None:
    """Print a diff with the comments on its lines. Comments that are not attached to a line come first."""
    at_line: dict[int, list[Any]] = defaultdict(list)
    places = _diff_lines(review["files"], text)
    for comment in review["comments"]:
        where = places.get((comment["file"], comment["side"], comment["end_line"]))
        if comment["anchor"] == "active" and where is not None:
            at_line[where].append(comment)
        else:
            click.echo(click.style(_comment_text(names, comment), fg="yellow"))
    for number, line in enumerate(text.removesuffix("\n").split("\n"), 1):
        is_header = line.startswith(("+++", "---", "diff "))
        click.echo(click.style(_printable(line), fg=None if is_header else COLOURS.get(line[:1]), bold=is_header))
        for comment in at_line[number]:
            click.echo(click.style("    | " + _comment_text(names, comment).replace("\n", "\n    | "), fg="yellow"))


def _diff_lines(files: list[Any], text: str) -> dict[tuple[str, str, int], int]:
    """Map each file line that is part of the diff to its line number in the diff.

    The keys are `(path, side, line number in the file)`.
    """
    lines, found = text.split("\n"), {}
    for file in files:
        for hunk in file["hunks"]:
            at, old, new = hunk["patch_line"], hunk["old_start"], hunk["new_start"]
            ends = old + hunk["old_lines"], new + hunk["new_lines"]
            while (old, new) != ends and at <= len(lines):
                kind = lines[at - 1][:1]
                if kind in (" ", "", "-"):
                    found[file["old_path"] or file["path"], "old", old] = at
                    old += 1
                if kind in (" ", "", "+"):
                    found[file["path"], "new", new] = at
                    new += 1
                at += 1
    return found


def _comment_text(names: ObjectNames, comment: Any) -> str:
    """Return the text of a comment with its author.

    If the comment is not anchored to a line of the current revision, the text says so and names its revision.
    """
    place = f" {comment['file']}" if comment["file"] else ""
    place += f":{comment['line']}" if comment["line"] else ""
    place += (
        f" ({comment['anchor']}, revision {comment['revision']})" if comment["anchor"] != "active" and place else ""
    )
    state = "resolved " if comment["resolved"] else ""
    suggestion = f"\nsuggestion: {comment['suggestion']}" if comment["suggestion"] else ""
    who = _author_text(names, comment["author"]["type"], comment["author"]["id"])
    return _printable(f"{state}{comment['severity']} by {who}{place}: {comment['body']}{suggestion}\n({comment['id']})")


def _printable(text: str) -> str:
    """Return the text without terminal control characters."""
    return "".join(each if each.isprintable() or each in "\t\n" else f"<U+{ord(each):04X}>" for each in text)


def _change_counts(stats: Any) -> str:
    files = "1 file" if stats["files"] == 1 else f"{stats['files']} files"
    return f"{files}, +{stats['additions']} -{stats['deletions']}"


def _file_text(file: Any) -> str:
    path = f"{file['old_path']} -> {file['path']}" if file["old_path"] else file["path"]
    size = "binary" if file["binary"] else f"+{file['additions']} -{file['deletions']}"
    return f"{file['status']} {path} ({size})"


def _author_text(names: ObjectNames, kind: str, identifier: str) -> str:
    """Return the type and the name of a user or an agent, such as `agent Coder`."""
    return f"{kind} {names.user(USERS_PATH, identifier) if kind == 'user' else names.name('/agents', identifier)}"


def _reviewer_text(names: ObjectNames, reviewer: Any) -> str:
    kind = "user" if reviewer["user_id"] else "agent"
    who = _author_text(names, kind, reviewer[f"{kind}_id"])
    return f"{who}: {reviewer['state']}{' (required)' if reviewer['required'] else ''}"
