"""The `corral approvals` commands, which list, make and decide approval requests from a terminal."""

from __future__ import annotations

import functools
import json
import time
from pathlib import Path
from typing import Any, get_args

import click

from corral.cli.api_client import ApiClient, ApiClientError
from corral.cli.object_lookup import ObjectNames
from corral.cli.output import print_fields, print_table
from corral.cli.request_body import body_option, field_option, read_body
from corral.cli.server_connection import client_command
from corral.ids import parse_id
from corral_core.accounts.api import USERS_PATH
from corral_plugins.approvals.api import OPEN, RISKS, Kind, Status

RULE_RISKS = RISKS[:2]  # rules never approve requests of a higher risk
POLL_SECONDS, RULE_POLLS = 0.1, 8
COLUMNS = ("title", "risk", "status", "asked_by", "expires_at", "id")

approval_argument = click.argument("approval")
note_option = click.option("--note", help="note for the requester")


@click.group("approvals")
def approvals_command_group() -> None:
    """Decide approval requests from agents, workflows and people. APPROVAL is an id or a title."""


@approvals_command_group.command("list")
@click.option(
    "--status",
    type=click.Choice([*get_args(Status), "all"]),
    multiple=True,
    help="list only approval requests with this status; repeatable",
)
@click.option("--mine", is_flag=True, help="list only approval requests that you may decide")
@click.option("--type", "kind", type=click.Choice(get_args(Kind)), help="list only approval requests of this type")
@click.option(
    "--risk",
    type=click.Choice(RISKS),
    multiple=True,
    help="list only approval requests with this risk level; repeatable",
)
@click.option(
    "--limit",
    type=click.IntRange(1, 200),
    default=50,
    show_default=True,
    help="maximum number of approval requests to list",
)
@client_command
def list_approvals(
    client: ApiClient,
    *,
    status: tuple[str, ...],
    mine: bool,
    kind: str | None,
    risk: tuple[str, ...],
    limit: int,
    as_json: bool,
) -> None:
    """List approval requests, most urgent first. By default, only pending requests are listed."""
    query: dict[str, Any] = {"limit": limit, "status": list(status), "risk": list(risk)}
    query |= {"assigned_to": "me"} if mine else {}
    query |= {"type": kind} if kind is not None else {}
    found = client.get("/approvals", **{name: value for name, value in query.items() if value})
    hint = "" if "all" in status else " List decided approvals too: corral approvals list --status all"
    print_table(
        found["items"],
        COLUMNS,
        as_json=as_json,
        empty=f"There are no such approval requests.{hint}",
        colour_of="status",
        computed={"asked_by": functools.partial(_requester, ObjectNames(client))},
    )


@approvals_command_group.command("show")
@approval_argument
@client_command
def show_approval(client: ApiClient, *, approval: str, as_json: bool) -> None:
    """Show the content of an approval, who requested it, and the decisions so far."""
    found = _find(client, approval)
    held, names = found["tool_call"] or {}, ObjectNames(client)
    shown = {
        "title": found["title"],
        "id": found["id"],
        "status": found["status"],
        "risk": found["risk"],
        "asked by": _requester(names, found),
        "tool": held.get("tool"),
        "target": held.get("target"),
        "untrusted sources": held.get("taint_sources"),
        "description": found["description"],
        "payload": _format_json(found["payload"]),
        "edited payload": _format_json(found["edited_payload"]) if found["edited_payload"] is not None else None,
        "payload hash": found["payload_sha256"],
        "task": f"{names.name('/tasks', found['task_id'], 'title')} ({found['task_id']})" if found["task_id"] else None,
        "workflow run": found["run_id"],
        "approvals": f"{found['approvals']} of {found['required']}",
        "approvers": _approvers(names, found["approvers"]),
        "you may decide": "yes" if found["can_decide"] else None,
        "expires": found["expires_at"],
        "decisions": "\n".join(_decision_text(names, each) for each in found["decisions"]),
        "note": found["outcome_note"],
        "execution": (found["execution"] or {}).get("status"),
        "comments": "\n".join(_comment_text(names, each) for each in found["comments"]),
    }
    print_fields(found, shown, as_json=as_json)


@approvals_command_group.command("ask")
@click.argument("title")
@body_option
@field_option
@client_command
def ask_for_approval(
    client: ApiClient, *, title: str, input_path: Path | None, fields: tuple[str, ...], as_json: bool
) -> None:
    """Request an approval. Set its fields with -f, for example -f risk=high -f 'payload:={"amount": 5}'."""
    made = client.post("/approvals", {**read_body(input_path, fields), "title": title})
    if as_json:
        click.echo(_format_json(made))
        return
    made = _after_rules(client, made)
    state = f"It expires at {made['expires_at']}."
    if made["status"] != "pending":
        by = "".join(f" by {ObjectNames(client).user(USERS_PATH, each['user_id'])}" for each in made["decisions"][-1:])
        state = f"It is {made['status']}{by}."
    click.echo(f"Asked: {made['title']} ({made['id']}). {state}")


@approvals_command_group.command("approve")
@approval_argument
@note_option
@click.option("--edit", metavar="JSON", help="payload to approve instead of the requested payload, as JSON")
@client_command
def approve_request(client: ApiClient, *, approval: str, note: str | None, edit: str | None, as_json: bool) -> None:
    """Approve a request with its current payload, or with an edited payload."""
    found = _find(client, approval)
    body: dict[str, Any] = {"payload_sha256": found["payload_sha256"], **({"note": note} if note else {})}
    if edit is not None:
        try:
            body["edited_payload"] = json.loads(edit)
        except ValueError as error:
            raise click.UsageError(f"--edit must be JSON: {error}") from None
    _act(client, found["id"], "approve", body, as_json=as_json)


@approvals_command_group.command("reject")
@approval_argument
@note_option
@client_command
def reject_request(client: ApiClient, *, approval: str, note: str | None, as_json: bool) -> None:
    """Reject a request. The requester continues and receives the note."""
    _act(client, _find(client, approval)["id"], "reject", {"note": note} if note else {}, as_json=as_json)


@approvals_command_group.command("request-revision")
@approval_argument
@click.option("--note", required=True, help="note that tells the requester what to change")
@client_command
def request_revision(client: ApiClient, *, approval: str, note: str, as_json: bool) -> None:
    """Ask the requester to revise the request."""
    _act(client, _find(client, approval)["id"], "request-revision", {"note": note}, as_json=as_json)


@approvals_command_group.command("revise")
@approval_argument
@click.argument("payload", metavar="JSON")
@client_command
def revise_request(client: ApiClient, *, approval: str, payload: str, as_json: bool) -> None:
    """Replace the payload of your request. Earlier decisions become void."""
    try:
        body = {"payload": json.loads(payload)}
    except ValueError as error:
        raise click.UsageError(f"the payload must be JSON: {error}") from None
    _act(client, _find(client, approval)["id"], "revise", body, as_json=as_json)


@approvals_command_group.command("cancel")
@approval_argument
@click.option("--reason", help="reason why the approval is no longer needed")
@client_command
def cancel_request(client: ApiClient, *, approval: str, reason: str | None, as_json: bool) -> None:
    """Cancel an undecided request."""
    _act(client, _find(client, approval)["id"], "cancel", {"reason": reason} if reason else {}, as_json=as_json)


@approvals_command_group.command("comment")
@approval_argument
@click.argument("text")
@client_command
def comment_on_approval(client: ApiClient, *, approval: str, text: str, as_json: bool) -> None:
    """Comment on an approval. The requester receives the comment immediately."""
    made = client.post(f"/approvals/{_find(client, approval)['id']}/comments", {"body": text})
    click.echo(_format_json(made) if as_json else "The comment was sent to the requester.")


def _after_rules(client: ApiClient, made: dict[str, Any]) -> dict[str, Any]:
    """Wait until the `approvals.auto_approve` rules have probably been applied. Return the updated approval."""
    for _ in range(RULE_POLLS if made["risk"] in RULE_RISKS else 0):
        if made["status"] != "pending":
            break
        time.sleep(POLL_SECONDS)
        made = client.get(f"/approvals/{made['id']}")
    return made


def _find(client: ApiClient, approval: str) -> dict[str, Any]:
    """Return the approval with this id, or the open approval with this title."""
    if parse_id(approval) is not None:
        with client.explain_not_found("approval", approval, "corral approvals list --status all"):
            return dict(client.get(f"/approvals/{approval}"))
    wanted = approval.strip().casefold()
    found = [each for each in client.pages("/approvals", status=list(OPEN)) if each["title"].casefold() == wanted]
    if not found:
        problem = f"there is no open approval request with the title {approval} at {client.url}"
        raise ApiClientError(f"{problem}; `corral approvals list --status all` shows all approval requests", 404)
    if len(found) > 1:
        ids = ", ".join(each["id"] for each in found)
        raise ApiClientError(
            f"{len(found)} approval requests have the title {approval}; give one of these ids instead: {ids}"
        )
    return dict(client.get(f"/approvals/{found[0]['id']}"))


def _act(client: ApiClient, approval_id: str, action: str, body: dict[str, Any], *, as_json: bool) -> None:
    changed = client.post(f"/approvals/{approval_id}/{action}", body)
    if as_json:
        click.echo(_format_json(changed))
        return
    count = f" ({changed['approvals']} of {changed['required']} approvals)" if changed["status"] == "pending" else ""
    click.echo(f"{changed['title']} ({changed['id']}) is {changed['status']}{count}.")


PLACES = {"agent": ("/agents", "name"), "worker": ("/workers", "name")}


def _requester(names: ObjectNames, approval: Any) -> str:
    """Describe the requester of an approval.

    Examples: `agent Buyer (task Order a server)`, `workflow Publish, run 3, step check`.
    """
    asked, step = approval["requested_by"], approval["step"]
    if asked["type"] == "workflow":
        run = names.read(f"/workflow-runs/{asked['id']}")
        if run is None:
            return f"workflow run {asked['id']}"
        name = names.name("/workflows", run["workflow_id"])
        return f"workflow {name}, run {run['number']}{f', step {step}' if step else ''}"
    if asked["type"] == "user":
        name = names.user(USERS_PATH, asked["id"])
    else:
        path, field = PLACES[asked["type"]]
        name = names.name(path, asked["id"], field)
    task_id = approval["task_id"]
    task = f" (task {names.name('/tasks', task_id, 'title')})" if task_id else ""
    return f"{asked['type']} {name}{task}"


def _approvers(names: ObjectNames, approvers: Any) -> str:
    """Return text that lists the approvers: each role in the plural, and each user's name."""
    users = (f"user {names.user(USERS_PATH, each)}" for each in approvers["users"])
    return ", ".join([*(f"{role}s" for role in approvers["roles"]), *users])


def _decision_text(names: ObjectNames, decision: Any) -> str:
    note = f": {decision['note']}" if decision["note"] else ""
    return f"{decision['decision']} by {names.user(USERS_PATH, decision['user_id'])} at {decision['at']}{note}"


def _comment_text(names: ObjectNames, comment: Any) -> str:
    author = comment["author"]
    name = names.user(USERS_PATH, author["id"]) if author["type"] == "user" else names.name("/agents", author["id"])
    return f"{author['type']} {name}: {comment['body']}"


def _format_json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)
