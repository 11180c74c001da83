"""`corral tasks`: manages the tasks of a server from a terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from corral.cli.api_client import ApiClient, ApiClientError
from corral.cli.output import COLOURS, format_usd, print_fields, print_table
from corral.cli.request_body import field_option, parse_fields, read_body
from corral.cli.server_connection import client_command, complete_names
from corral.cli.status_parts import read_if_allowed
from corral_plugins.tasks.commands.following import EventPrinter, cost_text, follow_task, result_text
from corral_plugins.tasks.commands.task_options import (
    agent_option,
    create_task,
    input_option,
    print_warnings,
    read_input,
    require_tool_option,
)

STATUSES = (
    "blocked",
    "pending",
    "assigned",
    "running",
    "waiting",
    "cancelling",
    "completed",
    "failed",
    "cancelled",
)
BAD_CALLS = ("failed", "denied")
MAX_CALLS = 10  # failed tool calls that `show` lists
LEVELS = ("debug", "info", "warning", "error")
PRIORITIES = ("low", "medium", "high", "critical")
LOG_COLOURS = {"warning": "yellow", "error": "red"}

task_argument = click.argument("task")


@click.group("tasks")
def tasks_command_group() -> None:
    """Manage tasks: pieces of work for agents. TASK is the id or the title of a task."""


@tasks_command_group.command("list")
@click.option("--status", type=click.Choice(STATUSES), multiple=True, help="list only tasks in this state; repeatable")
@click.option("--agent", metavar="NAME", help="list only tasks of this agent", shell_complete=complete_names("/agents"))
@click.option("--search", help="list only tasks whose title or description contains these words")
@click.option(
    "--limit", type=click.IntRange(1, 200), default=50, show_default=True, help="maximum number of tasks to list"
)
@client_command
def list_tasks(
    client: ApiClient, *, status: tuple[str, ...], agent: str | None, search: str | None, limit: int, as_json: bool
) -> None:
    """List tasks, newest first."""
    query: dict[str, Any] = {"status": list(status), "limit": limit}
    if agent is not None:
        query["agent_id"] = client.find("/agents", agent, kind="agent")["id"]
    if search is not None:
        query["search"] = search
    found = client.get("/tasks", **query)
    print_tasks(client, found["items"], as_json=as_json)
    if found["next"] and not as_json:
        click.echo(
            f"{found['total']} tasks in all; --limit shows more, --status and --search narrow them down.", err=True
        )


def print_tasks(client: ApiClient, tasks: list[Any], *, as_json: bool = False) -> None:
    """Print tasks as a table with the names of their agents."""
    names = {agent["id"]: agent["name"] for agent in client.pages("/agents")} if tasks and not as_json else {}
    print_table(
        tasks,
        ("title", "status", "agent", "attempt", "cost", "created_at", "id"),
        as_json=as_json,
        empty='There are no such tasks. Create one: corral run --agent NAME "INSTRUCTIONS"',
        colour_of="status",
        computed={
            "status": _status,
            "agent": lambda task: _agent_name(task, names),
            "attempt": lambda task: f"{task['attempt']}/{task['max_attempts']}",
            "cost": lambda task: format_usd(task["cost"]["cost_usd"]),
        },
    )


@tasks_command_group.command("show")
@task_argument
@client_command
def show_task(client: ApiClient, *, task: str, as_json: bool) -> None:
    """Show a task with its result, its error and its cost."""
    found = client.get(f"/tasks/{_find(client, task)['id']}")
    if as_json:
        print_fields(found, {}, as_json=True)
        return
    agent_id = found["assigned_agent_id"] or found["agent_id"]
    agent = client.get(f"/agents/{agent_id}")["name"] if agent_id else None
    explained = client.get(f"/tasks/{found['id']}/explain")
    error, progress = found["error"] or {}, found["progress"] or {}
    shown = {
        "title": found["title"],
        "id": found["id"],
        "status": found["status"],
        "cancelled": explained["summary"] if found["status"] == "cancelled" else None,
        "waiting for": _waiting_for(found) or (_obstacle(explained) if found["finished_at"] is None else None),
        "agent": agent or (f"any of role {found['agent_role']}" if found["agent_role"] else "any"),
        "worker": _worker_name(client, explained["attempts"]),
        "priority": found["priority"],
        "attempt": f"{found['attempt']} of at most {found['max_attempts']}",
        "instructions": found["instructions"],
        "input": json.dumps(found["input"], ensure_ascii=False) if found["input"] else None,
        "progress": progress.get("message") if found["finished_at"] is None else None,
        "result": result_text(found["result"]) if found["result"] is not None else None,
        "error": ": ".join(filter(None, (error.get("type"), error.get("message")))),
        "failed tool calls": _failed_calls(client, found["id"]),
        "what to do": _obstacle(explained) if found["finished_at"] is not None else None,
        "cost": cost_text(found["cost"]),
        "tokens": f"{found['cost']['input_tokens']} in, {found['cost']['output_tokens']} out",
        "created": found["created_at"],
        "started": found["started_at"],
        "finished": found["finished_at"],
    }
    print_fields(found, shown, as_json=False)


@tasks_command_group.command("create")
@agent_option
@click.option("--title", help="title of the task (default: the first line of the instructions)")
@click.option("--priority", type=click.Choice(PRIORITIES), help="priority of the task (default: medium)")
@input_option
@require_tool_option
@field_option
@click.argument("instructions")
@client_command
def create_task_command(
    client: ApiClient,
    *,
    agent: str,
    title: str | None,
    priority: str | None,
    input_path: Path | None,
    required_tools: tuple[str, ...],
    fields: tuple[str, ...],
    instructions: str,
    as_json: bool,
) -> None:
    """Create a task without following it. To create and follow a task, use `corral run`."""
    given = {"title": title, "priority": priority, "required_tools": list(required_tools) or None}
    named = {name: value for name, value in given.items() if value is not None}
    made = create_task(client, agent, instructions, read_input(input_path), **parse_fields(fields), **named)
    if as_json:
        click.echo(json.dumps(made, indent=2, ensure_ascii=False))
        return
    click.echo(f"Created {made['id']}. Follow it: corral tasks watch {made['id']}")
    print_warnings(client, made["id"], obstacles=True)


@tasks_command_group.command("watch")
@task_argument
@client_command
def watch_task(client: ApiClient, *, task: str, as_json: bool) -> None:
    """Follow a task from its first event to its result.

    The exit code is 0 only if the task is completed. Ctrl-C stops following the task but does not cancel it.
    """
    follow_task(client, _find(client, task)["id"], EventPrinter(quiet=as_json), as_json=as_json)


@tasks_command_group.command("logs")
@task_argument
@click.option(
    "--follow", is_flag=True, help="print new lines as they arrive, until the attempt ends or Ctrl-C is pressed"
)
@click.option(
    "--claim", type=click.IntRange(1), help="number of the claim whose log is printed (default: the latest claim)"
)
@click.option(
    "--level",
    type=click.Choice(LEVELS),
    multiple=True,
    help="print only lines of this level; repeatable",
)
@client_command
def show_logs(
    client: ApiClient, *, task: str, follow: bool, claim: int | None, level: tuple[str, ...], as_json: bool
) -> None:
    """Print the log of an attempt, by default the latest one."""
    task_id = _find(client, task)["id"]
    query: dict[str, Any] = {"level": list(level), **({"fence": claim} if claim else {})}
    with client.waiting_out_outages(lambda reason: click.echo(f"corral: {reason}", err=True)):
        _print_log(client, task_id, query, follow=follow, as_json=as_json)
    if claim is None and not as_json and (last := client.get(f"/tasks/{task_id}")["fence"]) > 1:
        earlier = "--claim 1 shows" if last == 2 else f"--claim 1 to --claim {last - 1} show"
        click.echo(f"This is the log of claim {last} of the task; {earlier} the earlier logs.", err=True)


@tasks_command_group.command("explain")
@task_argument
@client_command
def explain_task(client: ApiClient, *, task: str, as_json: bool) -> None:
    """Explain why a task is or is not running, and what to do about it."""
    found = client.get(f"/tasks/{_find(client, task)['id']}/explain")
    if as_json:
        click.echo(json.dumps(found, indent=2, ensure_ascii=False))
        return
    click.echo(f"{click.style(found['status'], fg=COLOURS.get(found['status']))}: {found['summary']}")
    for each in found["conditions"]:
        mark = click.style("ok", fg="green") if each["ok"] else click.style("no", fg="red")
        click.echo(f"  {mark}  {' '.join(filter(None, (each['detail'], each['unblock'])))}")
    for warning in found["warnings"]:
        click.echo(f"  {click.style('warning', fg='yellow')}  {warning}")
    for attempt in found["attempts"]:
        click.echo(f"  claim {attempt['fence']}: {_attempt_text(attempt)}")


@tasks_command_group.command("cancel")
@task_argument
@click.option("--reason", help="reason for the cancellation, stored with the task")
@client_command
def cancel_task(client: ApiClient, *, task: str, reason: str | None, as_json: bool) -> None:
    """Cancel a task. A running task ends as soon as its worker confirms the cancellation."""
    _act(client, task, "cancel", {"reason": reason}, as_json=as_json)


@tasks_command_group.command("retry")
@task_argument
@click.option(
    "--from-start", is_flag=True, help="start the task from the beginning instead of from its last checkpoint"
)
@click.option("--reason", help="reason for the retry, recorded in the event log")
@click.option(
    "--yes",
    is_flag=True,
    help="retry the task even if it failed because of its cost limit; the retry has the same limit",
)
@client_command
def retry_task(client: ApiClient, *, task: str, from_start: bool, reason: str | None, yes: bool, as_json: bool) -> None:
    """Run a failed or cancelled task again."""
    found = _find(client, task)
    if not yes and found["max_cost_usd"] is not None and (found["error"] or {}).get("kind") == "budget":
        unmet = next(
            (each for each in client.get(f"/tasks/{found['id']}/explain")["conditions"] if not each["ok"]), None
        )
        if unmet is not None:
            problem = f"{unmet['detail'].rstrip('.')}, and a retry keeps the limit. {unmet['unblock']}"
            raise ApiClientError(f"{problem}. Use --yes to retry the task unchanged")
    _act(client, found["id"], "retry", {"from_checkpoint": not from_start, "reason": reason}, as_json=as_json)


@tasks_command_group.command("answer")
@task_argument
@click.argument("answer", required=False)
@field_option
@client_command
def answer_task(client: ApiClient, *, task: str, answer: str | None, fields: tuple[str, ...], as_json: bool) -> None:
    """Answer the question that a task is waiting for. Give the answer as text or as fields."""
    if (answer is None) != bool(fields):
        raise click.UsageError("give either ANSWER or --field")
    found = _find(client, task)
    value: Any = read_body(None, fields) if answer is None else answer
    schema = (found["waiting_for"] or {}).get("schema") or {}
    if answer is not None and schema.get("type") not in (None, "string"):
        try:
            value = json.loads(answer)
        except ValueError:
            raise click.UsageError(f"the answer must be a JSON value of the type {schema['type']}") from None
    _act(client, found["id"], "input", {"input": value}, as_json=as_json)


def _find(client: ApiClient, task: str) -> dict[str, Any]:
    return dict(client.find("/tasks", task, kind="task", field="title"))


def _act(client: ApiClient, task: str, action: str, body: dict[str, Any], *, as_json: bool) -> None:
    changed = client.post(f"/tasks/{_find(client, task)['id']}/{action}", body)
    if as_json:
        click.echo(json.dumps(changed, indent=2, ensure_ascii=False))
    else:
        click.echo(f"{changed['title']} ({changed['id']}) is {changed['status']}.")


def _status(task: Any) -> str:
    waiting = task["waiting_for"]
    return f"waiting ({waiting['kind']})" if waiting else str(task["status"])


def _agent_name(task: Any, names: dict[str, str]) -> str:
    agent_id = task["assigned_agent_id"] or task["agent_id"]
    return str(names.get(agent_id, agent_id) if agent_id else task["agent_role"] or "-")


def _worker_name(client: ApiClient, attempts: list[Any]) -> str | None:
    """Return the name of the worker that ran the latest attempt, or the worker's id if the worker no longer exists.

    Return None if there are no attempts.
    """
    if not attempts:
        return None
    worker_id = str(attempts[-1]["worker_id"])
    try:
        return str(client.get(f"/workers/{worker_id}")["name"])
    except ApiClientError as error:
        if error.status != 404:
            raise
        return worker_id


def _waiting_for(task: Any) -> str | None:
    waiting = task["waiting_for"]
    if not waiting:
        return None
    if waiting["kind"] == "approval":
        return f"an approval\nDecide it: corral approvals show {waiting['id']}"
    if waiting["kind"] != "input":
        return str(waiting["kind"])
    return f"{waiting.get('prompt')}\nAnswer it: corral tasks answer {task['id']} ANSWER"


def _obstacle(explained: Any) -> str | None:
    """Return the first condition that keeps a task from being claimed, with its remedy, or None if there is none."""
    unmet = next((each for each in explained["conditions"] if not each["ok"]), None)
    return None if unmet is None else "\n".join(filter(None, (unmet["detail"], unmet["unblock"])))


def _failed_calls(client: ApiClient, task_id: str) -> str:
    """Describe the tool calls of a task that failed or were refused. Even a completed task may have such calls."""
    found = read_if_allowed(client, f"/tasks/{task_id}/tool-calls", limit=200)
    calls = [call for call in found["items"] if call["status"] in BAD_CALLS] if found is not None else []
    lines = [f"{call['tool']}: {call['status']}{_reason_of(call)}" for call in calls[:MAX_CALLS]]
    if len(calls) > MAX_CALLS:
        lines.append(f"{len(calls) - MAX_CALLS} more: corral api GET /tasks/{task_id}/tool-calls --all")
    return "\n".join(lines)


def _reason_of(call: Any) -> str:
    error = call["error"] or {}
    why = error.get("message") or error.get("type") or call["reason"]
    return f", {why}" if why else ""


def _attempt_text(attempt: Any) -> str:
    error = attempt["error"] or {}
    why = ": ".join(filter(None, (error.get("type"), error.get("message"))))
    return f"{attempt['status']}{f', {why}' if why else ''} ({format_usd(attempt['cost_usd'])})"


def _print_log(client: ApiClient, task_id: str, query: dict[str, Any], *, follow: bool, as_json: bool) -> None:
    """Print the log lines that match a query. With `follow`, also print new lines until the attempt ends."""
    while True:
        ended = not follow or client.get(f"/tasks/{task_id}")["finished_at"] is not None
        while items := client.get(f"/tasks/{task_id}/logs", **query, wait=0 if ended else 10)["items"]:
            for line in items:
                _print_log_line(line, as_json=as_json)
            query["after"] = items[-1]["seq"]
        if ended:
            return


def _print_log_line(line: Any, *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(line, ensure_ascii=False))
        return
    when = click.style(line["ts"], dim=True)
    level = click.style(f"{line['level']:<7}", fg=LOG_COLOURS.get(line["level"]))
    click.echo(f"{when}  {level}  {line['message']}")
