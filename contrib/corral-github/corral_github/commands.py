"""The `corral github` commands, which connect repositories and show their webhook deliveries and posts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from corral.cli.api_client import ApiClient
from corral.cli.output import print_fields, print_table, print_value
from corral.cli.request_body import body_option, field_option, read_body
from corral.cli.server_connection import client_command, complete_names

REPOSITORIES = "/github/repositories"
COLUMNS = ("name", "pull_requests", "issue_labels", "waiting", "state", "id")
DELIVERY_COLUMNS = ("created_at", "event", "action", "number", "status", "detail")
POST_COLUMNS = ("created_at", "kind", "number", "status", "attempts", "url", "detail")

repository_argument = click.argument("repository", shell_complete=complete_names(REPOSITORIES))


@click.group("github")
def github_command_group() -> None:
    """Connect GitHub repositories. REPOSITORY is an id, or a name such as corral/kernel."""


@github_command_group.command("list")
@client_command
def list_repositories(client: ApiClient, *, as_json: bool) -> None:
    """List the connected repositories, newest first."""
    print_table(
        list(client.pages(REPOSITORIES)),
        COLUMNS,
        as_json=as_json,
        empty="No repository is connected. Connect one: corral github add OWNER/NAME --agent AGENT",
        computed={"issue_labels": lambda row: " ".join(row["issue_labels"]), "state": _state},
    )


@github_command_group.command("show")
@repository_argument
@client_command
def show_repository(client: ApiClient, *, repository: str, as_json: bool) -> None:
    """Show a repository and the URL for its webhook."""
    _print(client, _find(client, repository), as_json=as_json)


@github_command_group.command("add")
@click.argument("name", metavar="OWNER/NAME")
@click.option(
    "--agent",
    required=True,
    help="name or id of the agent that works on issues and counts as the author of the changes in pull requests",
)
@click.option("--reviewer", help="name or id of the agent that comments on pull requests")
@click.option(
    "--token-secret",
    default="github-token",
    show_default=True,
    help="name of the secret that contains the GitHub token",
)
@click.option(
    "--webhook-secret",
    default="github-webhook",
    show_default=True,
    help="name of the secret with which GitHub signs webhook deliveries",
)
@click.option("--label", "labels", multiple=True, help="create tasks from issues with this label; repeatable")
@click.option(
    "--pull-requests",
    type=click.Choice(["code_review", "task", "ignore"]),
    default="code_review",
    show_default=True,
    help="how Corral handles pull requests: open a code review, create a task, or ignore them",
)
@click.option("--api-url", help="URL of the GitHub API (default: the API of github.com)")
@client_command
def add_repository(
    client: ApiClient,
    *,
    name: str,
    agent: str,
    reviewer: str | None,
    token_secret: str,
    webhook_secret: str,
    labels: tuple[str, ...],
    pull_requests: str,
    api_url: str | None,
    as_json: bool,
) -> None:
    """Connect a repository."""
    body: dict[str, Any] = {
        "name": name,
        "agent_id": client.find("/agents", agent, kind="agent")["id"],
        "token_secret": token_secret,
        "webhook_secret": webhook_secret,
        "issue_labels": list(labels),
        "pull_requests": pull_requests,
    }
    if reviewer is not None:
        body["reviewer_agent_id"] = client.find("/agents", reviewer, kind="agent")["id"]
    if api_url is not None:
        body["api_url"] = api_url
    _print(client, client.post(REPOSITORIES, body), as_json=as_json)


@github_command_group.command("edit")
@repository_argument
@field_option
@body_option
@client_command
def edit_repository(
    client: ApiClient, *, repository: str, fields: tuple[str, ...], input_path: Path | None, as_json: bool
) -> None:
    """Change a repository, for example with -f enabled:=false.

    From then on, Corral performs all work for the repository with your permissions.
    """
    changes = read_body(input_path, fields)
    if not changes:
        raise click.UsageError("nothing to change; give --input or --field")
    found = _find(client, repository)
    changed = client.send("PATCH", f"{REPOSITORIES}/{found['id']}", body=changes)
    _print(client, changed, as_json=as_json)


@github_command_group.command("remove")
@repository_argument
@client_command
def remove_repository(client: ApiClient, *, repository: str, as_json: bool) -> None:
    """Disconnect a repository. Its code reviews and tasks remain."""
    found = _find(client, repository)
    client.send("DELETE", f"{REPOSITORIES}/{found['id']}")
    told = {"id": found["id"], "removed": True}
    click.echo(json.dumps(told) if as_json else f"{found['name']} is disconnected.")


@github_command_group.command("deliveries")
@repository_argument
@click.option(
    "--limit", type=click.IntRange(1, 200), default=20, show_default=True, help="maximum number of deliveries to list"
)
@client_command
def list_deliveries(client: ApiClient, *, repository: str, limit: int, as_json: bool) -> None:
    """List the webhook deliveries from GitHub and their results, newest first."""
    found = client.get(f"{REPOSITORIES}/{_find(client, repository)['id']}/deliveries", limit=limit)["items"]
    print_table(found, DELIVERY_COLUMNS, as_json=as_json, empty="Nothing was delivered.", colour_of="status")


@github_command_group.command("posts")
@repository_argument
@click.option(
    "--limit",
    type=click.IntRange(1, 200),
    default=20,
    show_default=True,
    help="maximum number of comments and reviews to list",
)
@client_command
def list_posts(client: ApiClient, *, repository: str, limit: int, as_json: bool) -> None:
    """List the comments and reviews that Corral has posted or will post, newest first."""
    found = client.get(f"{REPOSITORIES}/{_find(client, repository)['id']}/posts", limit=limit)["items"]
    print_table(found, POST_COLUMNS, as_json=as_json, empty="Nothing was posted.", colour_of="status")


@github_command_group.command("retry")
@repository_argument
@client_command
def retry_repository(client: ApiClient, *, repository: str, as_json: bool) -> None:
    """Retry failed deliveries and posts immediately, even if GitHub has asked Corral to wait."""
    found = client.post(f"{REPOSITORIES}/{_find(client, repository)['id']}/retry", None)
    text = f"{found['deliveries']} deliveries and {found['posts']} posts will be tried again."
    print_value(found, as_json=as_json, text=text)


def _find(client: ApiClient, repository: str) -> Any:
    return client.find(REPOSITORIES, repository, kind="repository", listing="corral github list")


def _state(row: Any) -> str:
    if not row["enabled"]:
        return "disabled"
    if row["last_error"]:
        return "error"
    return "ok" if row["is_token_tried"] else "untried"


def _print(client: ApiClient, found: dict[str, Any], *, as_json: bool) -> None:
    shown = {
        "name": found["name"],
        "id": found["id"],
        "state": _state(found),
        "webhook address": f"{client.url}{found['hook_path']}",
        "API": found["api_url"],
        "token secret": found["token_secret"],
        "webhook secret": found["webhook_secret"],
        "agent": found["agent_id"],
        "reviewer": found["reviewer_agent_id"],
        "pull requests": found["pull_requests"],
        "issue labels": ", ".join(found["issue_labels"]),
        "waiting": found["waiting"],
        "paused until": found["paused_until"],
        "last error": found["last_error"],
        "warnings": found.get("warnings"),
    }
    print_fields(found, shown, as_json=as_json)
