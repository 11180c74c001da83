"""The `corral agents` commands, which manage a server's agents from a terminal."""

from __future__ import annotations

import difflib
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from corral.cli.api_client import ApiClient
from corral.cli.object_lookup import ObjectNames
from corral.cli.output import format_usd, print_fields, print_table
from corral.cli.request_body import body_option, field_option, read_body
from corral.cli.server_connection import client_command, complete_names
from corral.cli.status_parts import read_if_allowed, some_names

F = TypeVar("F", bound=Callable[..., Any])

STATUSES = ("offline", "idle", "busy", "draining", "paused", "error")
COLUMNS = ("name", "status", "model", "tools", "tasks", "last_active_at", "id")
WARNINGS = {
    "worker_offline": "its worker is offline; start `corral worker` on the machine of the worker",
    "worker_not_approved": "its worker is not approved; run `corral workers approve NAME`",
    "provider_not_configured": "the provider of its model {model} is not configured; configured: {providers}. "
    "Configure it ({command}), or choose another model (corral agents edit {name} --model PROVIDER/MODEL)",
    "model_not_found": "no provider offers its model {model}; configured: {providers}. Choose another one (corral "
    "agents edit {name} --model PROVIDER/MODEL); `corral api GET /llm/models` lists them",
    "tool_unavailable": "no active plugin and no online worker offers the tool",
    "tool_not_offered": "not every worker that may take its tasks offers the tool; require it for a task: corral run "
    "--require-tool",
}

agent_argument = click.argument("agent", shell_complete=complete_names("/agents"))


@click.group("agents")
def agents_command_group() -> None:
    """Manage agents, which are named configurations that work on tasks."""


@agents_command_group.command("list")
@click.option("--status", type=click.Choice(STATUSES), multiple=True, help="list only agents in this state; repeatable")
@click.option("--search", help="list only agents whose name contains this text")
@client_command
def list_agents(client: ApiClient, *, status: tuple[str, ...], search: str | None, as_json: bool) -> None:
    """List agents, sorted by name."""
    query = {"sort": "name", "status": list(status), **({"search": search} if search else {})}
    print_table(
        list(client.pages("/agents", **query)),
        COLUMNS,
        as_json=as_json,
        empty="There are no agents. Create one: corral agents create NAME --start",
        colour_of="status",
        computed={
            "status": _status,
            "model": _model,
            "tools": lambda agent: len(agent["enabled_tools"]),
            "tasks": lambda agent: f"{agent['active_tasks']}/{agent['max_concurrent_tasks']}",
        },
    )


@agents_command_group.command("show")
@agent_argument
@client_command
def show_agent(client: ApiClient, *, agent: str, as_json: bool) -> None:
    """Show an agent with its configuration and its current tasks."""
    found = _find(client, agent)
    shown = {
        "name": found["name"],
        "id": found["id"],
        "status": found["status"],
        "reason": found["status_reason"],
        "model": _model(found),
        "system prompt": found["system_prompt"],
        "tools": found["enabled_tools"],
        "role": found["role"],
        "review of results": _reviewer_text(client, found["review_policy"]),
        "description": found["description"],
        "tasks": found["current_task_ids"],
        "slots": f"{found['active_tasks']} of {found['max_concurrent_tasks']} in use",
        "spent this month": format_usd(found["spent_month_usd"]) if found["spent_month_usd"] is not None else None,
        "configuration": f"version {found['config_version']}",
        "last active": found["last_active_at"],
        "warnings": "\n".join(_warnings(client, found)),
    }
    print_fields(found, shown, as_json=as_json)


def _reviewer_text(client: ApiClient, policy: dict[str, Any]) -> str | None:
    """Return a sentence that says who reviews the agent's results, or None if nobody does."""
    if policy["mode"] == "none":
        return None
    reviewer = policy.get("reviewer_agent_id")
    if reviewer is None:
        return "by a person" if policy["mode"] == "human" else "by an agent"
    return f"by the agent {ObjectNames(client).name('/agents', reviewer)}"


def _configuration_options(function: F) -> F:
    """Add the options that set fields of an agent to a command."""
    for option in (
        body_option,
        field_option,
        click.option("--tool", "tools", multiple=True, help="tool that the agent may use; repeatable"),
        click.option(
            "--prompt-file",
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            help="file that contains the system prompt of the agent",
        ),
        click.option("--prompt", help="system prompt of the agent"),
        click.option("--model", help="model of the agent, such as openai/gpt-4o-mini"),
    ):
        function = option(function)
    return function


@agents_command_group.command("create")
@click.argument("name")
@_configuration_options
@click.option("--start", is_flag=True, help="start the agent after it is created")
@client_command
def create_agent(client: ApiClient, *, name: str, start: bool, as_json: bool, **options: Any) -> None:
    """Create an agent. It works on tasks only after it has been started."""
    made = client.post("/agents", {**_fields(**options), "name": name})
    hint = f"Start it: corral agents start {shlex.quote(made['name'])}"
    if start:
        made, hint = client.post(f"/agents/{made['id']}/start", {}), "It is started."
    _print_change(client, made, f"Created {made['name']} ({made['id']}). {hint}", as_json=as_json)


@agents_command_group.command("edit")
@agent_argument
@_configuration_options
@click.option("--name", help="new name of the agent")
@client_command
def edit_agent(client: ApiClient, *, agent: str, name: str | None, as_json: bool, **options: Any) -> None:
    """Change fields of an agent. Running tasks keep the configuration with which they started."""
    changes = {**_fields(**options), **({"name": name} if name is not None else {})}
    if not changes:
        raise click.UsageError("nothing to change; give an option such as --model, --prompt or --field")
    found = _find(client, agent)
    changed = client.send("PATCH", f"/agents/{found['id']}", body=changes)
    _print_change(
        client,
        changed,
        f"Changed {changed['name']}, configuration version {changed['config_version']}.",
        as_json=as_json,
    )


@agents_command_group.command("start")
@agent_argument
@click.option("--override", is_flag=True, help="start the agent even if its budget is used up (admins only)")
@client_command
def start_agent(client: ApiClient, *, agent: str, override: bool, as_json: bool) -> None:
    """Start an agent, so that it takes tasks."""
    found = _find(client, agent)
    _act(client, found["id"], "start", {"override": override}, as_json=as_json)
    if override and (found["status"], found["status_reason"]) != ("paused", "budget"):
        told = (
            f"--override had no effect: {found['name']} was not paused by its budget. If a task needs more than is "
            "left, "
            f"raise the budget: corral agents edit {shlex.quote(found['name'])} -f monthly_budget_usd:=AMOUNT"
        )
        click.echo(click.style("warning", fg="yellow") + f": {told}", err=True)


@agents_command_group.command("stop")
@agent_argument
@click.option("--drain", is_flag=True, help="stop the agent only after its running tasks have finished")
@click.option("--cancel-tasks", is_flag=True, help="cancel running tasks instead of returning them to the queue")
@click.option("--reason", help="reason for stopping the agent, recorded in the event log")
@client_command
def stop_agent(
    client: ApiClient, *, agent: str, drain: bool, cancel_tasks: bool, reason: str | None, as_json: bool
) -> None:
    """Stop an agent.

    By default, the agent stops immediately. Its tasks return to the queue and wait until the agent is started again.
    """
    if drain and cancel_tasks:
        raise click.UsageError("--drain and --cancel-tasks cannot be used together")
    body = {"mode": "drain" if drain else "immediate", "cancel_tasks": cancel_tasks, "reason": reason}
    _act(client, agent, "stop", body, as_json=as_json)


@agents_command_group.command("pause")
@agent_argument
@click.option("--reason", help="reason for pausing the agent, recorded in the event log")
@client_command
def pause_agent(client: ApiClient, *, agent: str, reason: str | None, as_json: bool) -> None:
    """Pause an agent. It takes no new tasks, but its running tasks continue."""
    _act(client, agent, "pause", {"reason": reason}, as_json=as_json)


@agents_command_group.command("resume")
@agent_argument
@client_command
def resume_agent(client: ApiClient, *, agent: str, as_json: bool) -> None:
    """Resume a paused agent."""
    _act(client, agent, "resume", {}, as_json=as_json)


@agents_command_group.command("versions")
@agent_argument
@client_command
def list_versions(client: ApiClient, *, agent: str, as_json: bool) -> None:
    """List the versions of an agent's configuration, newest first."""
    found = _find(client, agent)
    print_table(
        list(client.pages(f"/agents/{found['id']}/versions")),
        ("n", "at", "changed_fields", "attempts", "success_rate", "cost"),
        as_json=as_json,
        computed={
            "changed_fields": lambda row: row["changed_fields"] if row["n"] > 1 else "created",
            "success_rate": lambda row: "-" if row["success_rate"] is None else f"{row['success_rate']:.0%}",
            "cost": lambda row: format_usd(row["cost_usd"]),
        },
    )


@agents_command_group.command("rollback")
@agent_argument
@click.argument("version", type=click.IntRange(1))
@client_command
def roll_back_agent(client: ApiClient, *, agent: str, version: int, as_json: bool) -> None:
    """Restore an earlier configuration as a new version."""
    found = _find(client, agent)
    name = found["name"]
    with client.explain_not_found("version", f"{version} of {name}", f"`corral agents versions {shlex.quote(name)}`"):
        changed = client.post(f"/agents/{found['id']}/rollback", {"version": version})
    told = (
        f"{changed['name']} has the configuration of version {version} again, as version {changed['config_version']}."
    )
    _print_change(client, changed, told, as_json=as_json)


def _find(client: ApiClient, name: str) -> dict[str, Any]:
    return dict(client.find("/agents", name, kind="agent"))


def _act(client: ApiClient, agent: str, action: str, body: dict[str, Any], *, as_json: bool) -> None:
    found = _find(client, agent)
    changed = client.post(f"/agents/{found['id']}/{action}", body)
    _print_change(client, changed, f"{changed['name']} is {_status(changed)}.", as_json=as_json)


def _print_change(client: ApiClient, agent: dict[str, Any], text: str, *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(agent, indent=2, ensure_ascii=False))
        return
    click.echo(text)
    for each in _warnings(client, agent):
        click.echo(click.style("warning", fg="yellow") + f": {each}", err=True)


def _fields(
    model: str | None,
    prompt: str | None,
    prompt_file: Path | None,
    tools: tuple[str, ...],
    fields: tuple[str, ...],
    input_path: Path | None,
) -> dict[str, Any]:
    if prompt is not None and prompt_file is not None:
        raise click.UsageError("--prompt and --prompt-file cannot be used together")
    if prompt_file is not None:
        prompt = prompt_file.read_text("utf-8")
    named = {"llm_model": model, "system_prompt": prompt, "enabled_tools": list(tools) or None}
    return {**read_body(input_path, fields), **{name: value for name, value in named.items() if value is not None}}


def _status(agent: Any) -> str:
    reason = agent["status_reason"]
    return f"{agent['status']} ({reason})" if reason else str(agent["status"])


def _model(agent: Any) -> str:
    parts = [part for part in (agent["llm_provider"], agent["llm_model"]) if part]
    return "/".join(parts) or "default"


def _warnings(client: ApiClient, agent: dict[str, Any]) -> list[str]:
    """Return a sentence for each warning about an agent.

    A sentence about the agent's model can list the configured providers.
    """
    found = []
    for code in agent["warnings"]:
        kind, _, subject = code.partition(":")
        told = WARNINGS.get(kind, code)
        if "{providers}" in told:
            model, listed = _model(agent), read_if_allowed(client, "/llm/providers", limit=200)
            told = told.format(
                model=model,
                name=shlex.quote(agent["name"]),
                providers=_configured_providers(listed),
                command=_provider_command(model.partition("/")[0], listed),
            )
        if kind == "tool_unavailable":
            told += _tool_hint(client, agent, subject)
        found.append(f"{subject}: {told}" if subject else told)
    return found


def _tool_hint(client: ApiClient, agent: dict[str, Any], tool: str) -> str:
    """Return the end of the warning about an unavailable tool, which suggests a tool with a similar name.

    If there is none, it says how to list all tools.
    """
    listed = read_if_allowed(client, "/tools", limit=200)
    near = difflib.get_close_matches(tool, [each["name"] for each in listed["items"]] if listed else [], 1)
    if not near or near[0] == tool:
        return "; `corral tools list` shows all tools"
    corrected = dict.fromkeys(near[0] if name == tool else name for name in agent["enabled_tools"])
    tools = " ".join(f"--tool {shlex.quote(name)}" for name in corrected)
    return f"; did you mean {near[0]}? Correct it: corral agents edit {shlex.quote(agent['name'])} {tools}"


def _configured_providers(listed: Any) -> str:
    """Return the names of the configured providers. `listed` is None if the caller may not read them."""
    if listed is None:
        return "unknown, because you may not read the providers"
    return some_names([each["name"] for each in listed["items"] if each["configured"] and each["enabled"]]) or "none"


def _provider_command(provider: str, listed: Any) -> str:
    """Return the command that configures a provider. A provider that Corral does not know needs a kind and a URL.

    `listed` is None if the caller may not read the providers that Corral knows.
    """
    command = f"corral api POST /llm/providers -f name={shlex.quote(provider)}"
    unknown = "-f kind=openai -f base_url=URL"
    if listed is None:
        return f"{command} -f api_key=@FILE, and {unknown} if Corral does not know the provider"
    if provider in [each["name"] for each in listed["items"]]:
        return f"{command} -f api_key=@FILE"
    return f"{command} {unknown} -f api_key=@FILE, or with kind=anthropic"
