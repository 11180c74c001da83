"""`corral workflows`: manages workflows and their runs from a terminal."""

from __future__ import annotations

import contextlib
import functools
import json
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click

from corral import clock
from corral.cli.api_client import ApiClient, ApiClientError
from corral.cli.object_lookup import ObjectNames
from corral.cli.output import format_ms, format_usd, print_fields, print_table, print_value
from corral.cli.request_body import body_option, field_option, parse_fields, read_body
from corral.cli.server_connection import client_command, complete_names
from corral.ids import parse_id
from corral_core.accounts.api import USERS_PATH
from corral_plugins.workflows.following import follow_run
from corral_plugins.workflows.wait_reasons import step_name, task_obstacles, waited_for

F = TypeVar("F", bound=Callable[..., Any])

STATUSES = ("queued", "running", "waiting", "paused", "completed", "failed", "cancelled")
COLUMNS = ("name", "status", "steps", "last_run", "updated_at", "id")
RUN_COLUMNS = ("workflow", "number", "status", "started_by", "started_at", "finished_at", "cost", "id")
STEP_COLUMNS = ("step", "type", "status", "attempts", "took", "cost", "output")
HEAD_LENGTH = 60  # characters of an output or error that a table shows
workflow_argument = click.argument("workflow", shell_complete=complete_names("/workflows"))
run_argument = click.argument("run", shell_complete=complete_names("/workflows"))


@click.group("workflows")
def workflows_command_group() -> None:
    """Manage workflows and their runs.

    RUN is the id of a run, the name of a workflow (for its newest run), or NAME/NUMBER.
    """


@workflows_command_group.command("list")
@click.option(
    "--status",
    type=click.Choice(("draft", "active", "archived")),
    multiple=True,
    help="list only workflows in this state; repeatable",
)
@click.option("--search", help="list only workflows whose name or description contains this text")
@client_command
def list_workflows(client: ApiClient, *, status: tuple[str, ...], search: str | None, as_json: bool) -> None:
    """List all workflows, newest first."""
    query = {"status": list(status), **({"search": search} if search else {})}
    print_table(
        list(client.pages("/workflows", **query)),
        COLUMNS,
        as_json=as_json,
        empty="There are no workflows. Create one: corral workflows create NAME --input FILE",
        colour_of="status",
        computed={
            "steps": lambda row: row["step_count"],
            "last_run": lambda row: row["last_run"]["status"] if row["last_run"] else "-",
        },
    )


@workflows_command_group.command("show")
@workflow_argument
@client_command
def show_workflow(client: ApiClient, *, workflow: str, as_json: bool) -> None:
    """Show a workflow with its steps."""
    found = client.get(f"/workflows/{_find(client, workflow)['id']}")
    if as_json:
        print_value(found, as_json=True, text="")
        return
    shown = {
        "name": found["name"],
        "id": found["id"],
        "status": "template" if found["is_template"] else found["status"],
        "description": found["description"],
        "definition": f"version {found['workflow_version']}",
        "tags": found["tags"],
    }
    print_fields(found, shown, as_json=False)
    print_table(
        found["steps"],
        ("order", "name", "step_type", "depends_on", "run_if", "on_error"),
        as_json=False,
        empty="The workflow has no steps.",
    )


@workflows_command_group.command("create")
@click.argument("name")
@field_option
@body_option
@client_command
def create_workflow(
    client: ApiClient, *, name: str, fields: tuple[str, ...], input_path: Path | None, as_json: bool
) -> None:
    """Create a workflow from a file that contains its configuration and its steps."""
    made = client.post("/workflows", {**read_body(input_path, fields), "name": name})
    others = client.others_of_name("/workflows", made)
    told = f"Created {made['name']} ({made['id']}) with {_step_count_text(made['step_count'])}."
    if made["step_count"]:
        told += f" Run it: corral workflows run {made['id'] if others else shlex.quote(made['name'])}"
    if others:
        told += f"\nOther workflows have the same name, so use the id of the workflow. The others: {', '.join(others)}"
    print_value(made, as_json=as_json, text=told)
    _print_warnings(client.post(f"/workflows/{made['id']}/validate", {}))


@workflows_command_group.command("edit")
@workflow_argument
@click.option("--name", help="new name of the workflow")
@field_option
@body_option
@client_command
def edit_workflow(
    client: ApiClient,
    *,
    workflow: str,
    name: str | None,
    fields: tuple[str, ...],
    input_path: Path | None,
    as_json: bool,
) -> None:
    """Change fields of a workflow.

    The file has the same format as for `corral workflows create`, and replaces the configuration and the steps. Runs
    keep the definition that they started with.
    """
    changes = {**read_body(input_path, fields), **({"name": name} if name is not None else {})}
    if not changes:
        raise click.UsageError("nothing to change; give --input, --field or --name")
    changed = client.send("PATCH", f"/workflows/{_find(client, workflow)['id']}", body=changes)
    told = f"Changed {changed['name']}, definition version {changed['workflow_version']}."
    print_value(changed, as_json=as_json, text=told)
    _print_warnings(client.post(f"/workflows/{changed['id']}/validate", {}))


@workflows_command_group.command("delete")
@workflow_argument
@click.option("--force", is_flag=True, help="cancel the active runs of the workflow")
@click.option("--yes", is_flag=True, help="delete the workflow even if triggers run it")
@client_command
def delete_workflow(client: ApiClient, *, workflow: str, force: bool, yes: bool, as_json: bool) -> None:
    """Delete a workflow. Its runs stay readable. Triggers that start it will fail."""
    found = _find(client, workflow)
    if not yes and (triggers := _triggers_of(client, found["id"])):
        raise ApiClientError(
            f"these triggers run the workflow {found['name']} and would fail without it: {', '.join(triggers)}; delete "
            "them (corral triggers delete NAME), or delete only the workflow with --yes"
        )
    client.send("DELETE", f"/workflows/{found['id']}", query={"force": "true"} if force else None)
    print_value({"id": found["id"], "deleted": True}, as_json=as_json, text=f"Deleted {found['name']} ({found['id']}).")


@workflows_command_group.command("validate")
@workflow_argument
@client_command
def validate_workflow(client: ApiClient, *, workflow: str, as_json: bool) -> None:
    """Check a workflow against the active plugins. The exit code is 1 if the workflow has errors.

    Warnings describe agent steps without instructions, and problems that would currently keep a step from running, such
    as a tool that no agent may use.
    """
    found = client.post(f"/workflows/{_find(client, workflow)['id']}/validate", {})
    lines = [f"{each['pointer']}: {each['detail']}" for each in found["errors"]]
    print_value(found, as_json=as_json, text="\n".join(lines or [_validity_text(found)]))
    _print_warnings(found)
    if not found["valid"]:
        raise SystemExit(1)


@workflows_command_group.command("run")
@workflow_argument
@click.option(
    "-i",
    "--value",
    "-f",
    "--field",
    "values",
    multiple=True,
    metavar="KEY=VALUE",
    help="field of the input, as KEY=TEXT or KEY:=JSON; repeatable",
)
@body_option
@click.option("--dry-run", is_flag=True, help="show the steps that would run, without running them")
@click.option("--wait", is_flag=True, help="wait until the run has ended, and print its output")
@client_command
def run_workflow(
    client: ApiClient,
    *,
    workflow: str,
    values: tuple[str, ...],
    input_path: Path | None,
    dry_run: bool,
    wait: bool,
    as_json: bool,
) -> None:
    """Run a workflow. The file given with --input contains the input of the run."""
    given = {**read_body(input_path, ()), **parse_fields(values)}
    made = client.post(f"/workflows/{_find(client, workflow)['id']}/run", {"input": given, "dry_run": dry_run})
    if dry_run:
        _print_plan(made, as_json=as_json)
    elif wait:
        _finish(_watch(client, made["id"], quiet=as_json), as_json=as_json)
    else:
        told = f"Run {made['number']} is {made['status']}. Watch it: corral workflows watch {made['id']}"
        print_value(made, as_json=as_json, text=told)


@workflows_command_group.command("runs")
@click.argument("workflow", required=False)
@click.option("--status", type=click.Choice(STATUSES), multiple=True, help="list only runs in this state; repeatable")
@click.option(
    "--limit", type=click.IntRange(1, 200), default=20, show_default=True, help="maximum number of runs to list"
)
@client_command
def list_runs(client: ApiClient, *, workflow: str | None, status: tuple[str, ...], limit: int, as_json: bool) -> None:
    """List the newest runs of one workflow or of all workflows."""
    path = "/workflow-runs" if workflow is None else f"/workflows/{_find(client, workflow)['id']}/runs"
    names = ObjectNames(client)
    print_table(
        client.get(path, status=list(status), limit=limit)["items"],
        RUN_COLUMNS,
        as_json=as_json,
        empty="There are no runs. Start one: corral workflows run NAME",
        colour_of="status",
        computed={
            "workflow": lambda row: names.name("/workflows", row["workflow_id"]),
            "started_by": lambda row: _starter(names, row),
            "cost": lambda row: format_usd(row["cost_usd"]),
        },
    )


@workflows_command_group.command("show-run")
@run_argument
@client_command
def show_run(client: ApiClient, *, run: str, as_json: bool) -> None:
    """Show a run with its steps, including their status, attempts, time, cost, and the beginning of their outputs."""
    with _explain_not_found(client, run):
        found, names = client.get(f"/workflow-runs/{_run_id(client, run)}"), ObjectNames(client)
    if as_json:
        print_value(found, as_json=True, text="")
        return
    error = found["error"] or {}
    shown = {
        "workflow": f"{found['definition']['name']} ({found['workflow_id']}), version {found['workflow_version']}",
        "run": f"{found['number']} ({found['id']})",
        "status": found["status"],
        "error": ": ".join(filter(None, (error.get("step"), error.get("message")))),
        "started by": _starter(names, found),
        "repeats": found["retry_of"],
        "created": found["created_at"],
        "took": _duration(found) if found["finished_at"] else None,
        "cost": format_usd(found["cost_usd"]),
        "input": _head(found["input"]),
        "output": _head(found["output"]) if found["output"] is not None else None,
    }
    print_fields(found, shown, as_json=False)
    computed: dict[str, Callable[[Mapping[str, Any]], Any]] = {
        "step": step_name,
        "type": lambda step: step["step_type"],
        "attempts": lambda step: step["attempt"] if step["started_at"] else "-",
        "took": _duration,
        "cost": lambda step: format_usd(step["cost_usd"]),
        "output": functools.partial(_result_of_step, names),
    }
    print_table(
        found["steps"],
        STEP_COLUMNS,
        as_json=False,
        empty="No step has begun.",
        colour_of="status",
        computed=computed,
    )
    if found["step_count"] > len(found["steps"]):
        click.echo(f"The run has {found['step_count']} steps; the first {len(found['steps'])} are shown.")
    for name, why in task_obstacles(client, found).items():
        click.echo(f"{name} waits: {why}")


@workflows_command_group.command("watch")
@run_argument
@client_command
def watch_run(client: ApiClient, *, run: str, as_json: bool) -> None:
    """Follow a run to its end, and print its output. The exit code is 1 if the run does not complete."""
    _finish(_watch(client, _run_id(client, run), quiet=as_json), as_json=as_json)


@workflows_command_group.command("cancel")
@run_argument
@click.option("--reason", help="reason for the cancellation")
@client_command
def cancel_run(client: ApiClient, *, run: str, reason: str | None, as_json: bool) -> None:
    """Cancel a run. Steps that are running are stopped."""
    _act(client, run, "cancel", {"reason": reason}, "The run is being cancelled.", as_json=as_json)


@workflows_command_group.command("pause")
@run_argument
@client_command
def pause_run(client: ApiClient, *, run: str, as_json: bool) -> None:
    """Pause a run. Steps that are already running may finish, but no new step starts."""
    _act(client, run, "pause", {}, "The run is paused.", as_json=as_json)


@workflows_command_group.command("resume")
@run_argument
@client_command
def resume_run(client: ApiClient, *, run: str, as_json: bool) -> None:
    """Resume a paused run."""
    _act(client, run, "resume", {}, "The run continues.", as_json=as_json)


@workflows_command_group.command("retry")
@run_argument
@click.option(
    "--from",
    "start",
    default="failed",
    show_default=True,
    help="starting point: 'failed' for the failed steps, 'start' for the first steps, or the name of a step",
)
@click.option("--current", is_flag=True, help="use the workflow's current definition instead of the run's definition")
@client_command
def retry_run(client: ApiClient, *, run: str, start: str, current: bool, as_json: bool) -> None:
    """Repeat an ended run as a new run that reuses the outputs of the earlier steps."""
    body = {"from": start, "definition": "current" if current else "original"}
    with _explain_not_found(client, run):
        made = client.post(f"/workflow-runs/{_run_id(client, run)}/retry", body)
    told = f"Run {made['number']} repeats it. Watch it: corral workflows watch {made['id']}"
    if not current and not as_json and (newest := _newer_version(client, made)):
        used = f"It uses version {made['workflow_version']} of the definition, as the run did, and not version {newest}"
        told += f"\n{used}. Repeat the run with the changes: corral workflows retry {run} --from {start} --current"
    print_value(made, as_json=as_json, text=told)


@workflows_command_group.command("answer")
@run_argument
@click.argument("step")
@field_option
@body_option
@client_command
def answer_step(
    client: ApiClient, *, run: str, step: str, fields: tuple[str, ...], input_path: Path | None, as_json: bool
) -> None:
    """Submit the data that a step of the type `input` asks for."""
    given, run_id = {"input": read_body(input_path, fields)}, _run_id(client, run)
    with client.explain_not_found(f"step {step} in the workflow run", run, "corral workflows runs"):
        changed = client.post(f"/workflow-runs/{run_id}/steps/{step}/input", given)
    print_value(changed, as_json=as_json, text=f"The data for the step {step} was submitted.")


def _step_count_text(steps: int) -> str:
    return "1 step" if steps == 1 else f"{steps} steps"


def _find(client: ApiClient, name: str) -> dict[str, Any]:
    return dict(client.find("/workflows", name, kind="workflow"))


def _validity_text(validation: Mapping[str, Any]) -> str:
    return "The workflow has no errors, but warnings." if validation["warnings"] else "The workflow is valid."


def _print_warnings(validation: Mapping[str, Any]) -> None:
    for each in validation["warnings"]:
        click.echo(f"Warning: {each['pointer']}: {each['detail']}", err=True)


def _duration(item: Mapping[str, Any]) -> str:
    """Return how long a run or a step took, or has taken so far."""
    if item["started_at"] is None:
        return "-"
    return format_ms(clock.elapsed_ms(item["started_at"], item["finished_at"] or clock.now()))


def _result_of_step(names: ObjectNames, step: Mapping[str, Any]) -> str:
    """Return the object that a step waits for, or the step's error, the beginning of its output, or its skip reason."""
    if (waits := waited_for(names, step)) is not None:
        return waits
    if step["error"] is not None:
        return _head(step["error"].get("message", step["error"]))
    return _head(step["output"]) if step["output"] is not None else step["reason"] or "-"


def _head(value: Any) -> str:
    """Return the beginning of a JSON value on one line. Strings are shown without quotation marks."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    line = " ".join(text.split())
    return line if len(line) <= HEAD_LENGTH else f"{line[: HEAD_LENGTH - 1]}…"


def _act(client: ApiClient, run: str, action: str, body: dict[str, Any], told: str, *, as_json: bool) -> None:
    with _explain_not_found(client, run):
        changed = client.post(f"/workflow-runs/{_run_id(client, run)}/{action}", body)
    print_value(changed, as_json=as_json, text=told)


def _run_id(client: ApiClient, run: str) -> str:
    """Return the id of the run that `run` names.

    `run` is a run's id, the name of a workflow, which stands for its newest run, or `NAME/NUMBER`.
    """
    if parse_id(run) is not None:
        return run
    name, _, number = run.rpartition("/")
    if not name or not number.isdigit():
        name, number = run, ""
    found = client.find("/workflows", name, kind="workflow")
    runs = client.pages(f"/workflows/{found['id']}/runs")
    chosen = next((each for each in runs if number in ("", str(each["number"]))), None)
    if chosen is None:
        which = f"run {number}" if number else "run yet"
        problem = f"there is no {which} of the workflow {found['name']} at {client.url}"
        raise ApiClientError(f"{problem}; `corral workflows runs {shlex.quote(found['name'])}` shows its runs", 404)
    return str(chosen["id"])


def _explain_not_found(client: ApiClient, run: str) -> contextlib.AbstractContextManager[None]:
    is_id = parse_id(run) is not None
    return client.explain_not_found("workflow run", run, "corral workflows runs") if is_id else contextlib.nullcontext()


def _starter(names: ObjectNames, run: Mapping[str, Any]) -> str:
    """Return who or what started a run, such as `trigger Daily` or the e-mail address of a user."""
    trigger = run["trigger"]
    if trigger["type"] == "manual":
        return names.user(USERS_PATH, run["started_by"])
    if trigger["type"] == "workflow":
        parent = names.read(f"/workflow-runs/{run['parent_run_id']}") if run["parent_run_id"] else None
        return "workflow" if parent is None else f"workflow {names.name('/workflows', parent['workflow_id'])}"
    return f"trigger {names.name('/triggers', trigger['id'])}" if trigger["id"] else str(trigger["type"])


def _newer_version(client: ApiClient, run: Mapping[str, Any]) -> int | None:
    """Return the workflow's current version number, or None if it is not newer than the version of the run."""
    workflow = ObjectNames(client).read(f"/workflows/{run['workflow_id']}")
    if workflow is None or workflow["workflow_version"] <= run["workflow_version"]:
        return None
    return int(workflow["workflow_version"])


def _triggers_of(client: ApiClient, workflow_id: str) -> list[str]:
    """Return the names of the triggers that start a workflow."""
    try:
        triggers = list(client.pages("/triggers"))
    except ApiClientError as error:
        if error.status not in (403, 404):
            raise
        return []  # the plugin is not active
    return [each["name"] for each in triggers if each["action"].get("workflow_id") == workflow_id]


def _print_plan(plan: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(plan, indent=2, ensure_ascii=False))
        return
    print_table(plan["plan"], ("stage", "name", "step_type", "depends_on", "run_if"), as_json=False, empty="No steps.")
    for kind, names in plan["missing"].items():
        if names:
            click.echo(f"missing {kind}: {', '.join(names)}", err=True)


def _watch(client: ApiClient, run_id: str, *, quiet: bool) -> dict[str, Any]:
    with _explain_not_found(client, run_id):
        run = client.get(f"/workflow-runs/{run_id}")
    return follow_run(client, run, quiet=quiet)


def _finish(run: dict[str, Any], *, as_json: bool) -> None:
    """Print the output of an ended run. Exit with status 1 if the run did not complete."""
    error = run["error"] or {}
    if as_json:
        click.echo(json.dumps(run, indent=2, ensure_ascii=False))
    elif run["status"] == "completed":
        click.echo(json.dumps(run["output"], indent=2, ensure_ascii=False))
    else:
        click.echo(f"The run ended with the status {run['status']}. {error.get('message', '')}".strip(), err=True)
    if run["status"] != "completed":
        _exit_with_failure()


def _exit_with_failure() -> NoReturn:
    raise SystemExit(1)
