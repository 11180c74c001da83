"""The `corral triggers` commands, which manage triggers from a terminal."""

from __future__ import annotations

import functools
import json
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from corral.cli.api_client import ApiClient
from corral.cli.object_lookup import ObjectNames
from corral.cli.output import format_ms, print_fields, print_table, print_value
from corral.cli.request_body import body_option, field_option, parse_fields, read_body
from corral.cli.server_connection import client_command, complete_names
from corral.ids import parse_id

F = TypeVar("F", bound=Callable[..., Any])

COLUMNS = ("name", "type", "enabled", "action", "next_fire_at", "last_status", "fires_24h", "id")
HISTORY_COLUMNS = ("scheduled_for", "status", "result", "attempt", "duration", "reason")
STATUSES = (
    *("pending", "fired", "skipped_overlap", "skipped_missed", "filtered"),
    *("coalesced", "duplicate", "rate_limited", "loop", "failed"),
)

REASONS = {
    "max_failures": "disabled after failures in a row",
    "owner_inactive": "disabled because its owner may not run its action",
}
OBJECTS = {
    "workflow_id": ("/workflows", "name"),
    "agent_id": ("/agents", "name"),
    "recipient_agent_id": ("/agents", "name"),
    "webhook_id": ("/webhooks", "host"),
    "task_id": ("/tasks", "title"),
}
"""The fields of actions and results that contain object ids.

Each field is mapped to the API path of the object, and to the object's field that contains its name.
"""

trigger_argument = click.argument("trigger", shell_complete=complete_names("/triggers"))
payload_option = click.option(
    "-p",
    "--payload",
    "payload",
    multiple=True,
    metavar="KEY=VALUE",
    help="field of the payload, as KEY=TEXT or KEY:=JSON; repeatable",
)


def _when_options(command: F) -> F:
    """Add the options for times and events, which the commands `create` and `edit` share."""
    return _with_options(
        command,
        click.option(
            "--cron", help="fire at the times that this cron expression specifies, such as '0 7 * * mon-fri' or @daily"
        ),
        click.option("--timezone", help="time zone for --cron, such as Europe/Berlin"),
        click.option("--every", type=click.IntRange(10), metavar="SECONDS", help="fire at this interval, in seconds"),
        click.option("--event", help="fire on this event, such as task.failed or task.*"),
    )


def _action_options(command: F) -> F:
    """Add the options for the filter and the action, which the commands `create` and `edit` share."""
    return _with_options(
        command,
        click.option(
            "--filter",
            "condition",
            help="CEL expression that uses `payload` and `event`; the trigger fires only if the expression is true",
        ),
        click.option(
            "--task",
            help="create a task with this title when the trigger fires; the title may contain {{ expressions }}",
        ),
        click.option(
            "--agent",
            metavar="NAME",
            help="agent for the task that --task creates (default: any idle agent)",
            shell_complete=complete_names("/agents"),
        ),
        click.option(
            "--workflow", help="run this workflow when the trigger fires", shell_complete=complete_names("/workflows")
        ),
        click.option(
            "-i",
            "--value",
            "values",
            multiple=True,
            metavar="KEY=VALUE",
            help="field of the input for the workflow given with --workflow, as KEY=TEXT or KEY:=JSON; the value "
            "may contain {{ expressions }}; repeatable",
        ),
    )


def _with_options(command: F, *options: Callable[[F], F]) -> F:
    for option in reversed(options):
        command = option(command)
    return command


@click.group("triggers")
def triggers_command_group() -> None:
    """Manage triggers, which start work at a set time, on an event or on a webhook request."""


@triggers_command_group.command("list")
@click.option("--type", "types", multiple=True, help="list only triggers of this type; repeatable")
@click.option("--enabled/--disabled", default=None, help="list only enabled or only disabled triggers")
@click.option("--search", help="list only triggers whose name or description contains this text")
@client_command
def list_triggers(
    client: ApiClient, *, types: tuple[str, ...], enabled: bool | None, search: str | None, as_json: bool
) -> None:
    """List triggers, newest first."""
    query: dict[str, Any] = {"type": list(types)}
    if enabled is not None:
        query["enabled"] = "true" if enabled else "false"
    if search is not None:
        query["search"] = search
    print_table(
        list(client.pages("/triggers", **query)),
        COLUMNS,
        as_json=as_json,
        empty="There are no such triggers. Create one: corral triggers create NAME --cron EXPRESSION --task TITLE",
        computed={
            "action": functools.partial(_action_text, ObjectNames(client)),
            "enabled": _state,
        },
    )


@triggers_command_group.command("show")
@trigger_argument
@client_command
def show_trigger(client: ApiClient, *, trigger: str, as_json: bool) -> None:
    """Show a trigger and the next times at which it fires."""
    found = client.get(f"/triggers/{_find(client, trigger)}")
    action = f"{_action_text(ObjectNames(client), found)}\n{json.dumps(found['action'], ensure_ascii=False)}"
    state = _state(found)
    if found["disabled_reason"]:
        name = shlex.quote(found["name"])
        state += (
            f"\nSee why: corral triggers history {name} --status failed\nEnable it: corral triggers toggle {name} --on"
        )
    shown = {
        "name": found["name"],
        "id": found["id"],
        "type": found["type"],
        "description": found["description"],
        "times": found["schedule_text"],
        "config": json.dumps(found["config"], ensure_ascii=False),
        "signature": _signature_text(found),
        "action": action,
        "filter": found["filter"],
        "enabled": state,
        "overlap": found["overlap"],
        "missed times": found["catch_up"],
        "last fired": found["last_fire_at"],
        "last status": found["last_status"],
        "failures in a row": found["consecutive_failures"],
        "next times": found["next_fires"],
        "warning": "\n".join(found["warnings"]),
    }
    print_fields(found, shown, as_json=as_json)


@triggers_command_group.command("create")
@click.argument("name")
@body_option
@field_option
@_when_options
@click.option("--webhook", is_flag=True, help="fire when a request is sent to the URL that this command prints")
@click.option("--manual", is_flag=True, help="fire only when `corral triggers fire` is run")
@_action_options
@client_command
def create_trigger(
    client: ApiClient,
    *,
    name: str,
    input_path: Path | None,
    fields: tuple[str, ...],
    task: str | None,
    agent: str | None,
    workflow: str | None,
    values: tuple[str, ...],
    condition: str | None,
    as_json: bool,
    **when: Any,
) -> None:
    """Create a trigger. `corral api GET /triggers/types` lists all available types and actions."""
    body = _with_type_and_config(read_body(input_path, fields), **when) | {"name": name}
    if condition is not None:
        body["filter"] = condition
    body |= _action_fields(client, body.get("action", {}), task, agent, workflow, values)
    if "type" not in body or "action" not in body:
        raise click.UsageError(
            "say when the trigger fires, for example with --cron, and what it starts, with --task or --workflow"
        )
    made = client.post("/triggers", {"config": {}, **body})
    lines = [f"Created {made['name']} ({made['id']})."]
    if made["next_fire_at"] is not None:
        lines.append(f"It fires next at {made['next_fire_at']}.")
    if others := client.others_of_name("/triggers", made):
        lines.append(
            f"Other triggers have the same name, so use the id of the trigger. The others: {', '.join(others)}"
        )
    lines += _ingress_lines(client, made)
    lines += _warning_lines(made)
    print_value(made, as_json=as_json, text="\n".join(lines))


@triggers_command_group.command("edit")
@trigger_argument
@body_option
@field_option
@click.option("--name", help="new name of the trigger")
@_when_options
@_action_options
@client_command
def edit_trigger(
    client: ApiClient,
    *,
    trigger: str,
    input_path: Path | None,
    fields: tuple[str, ...],
    name: str | None,
    task: str | None,
    agent: str | None,
    workflow: str | None,
    values: tuple[str, ...],
    condition: str | None,
    as_json: bool,
    **when: Any,
) -> None:
    """Change fields of a trigger. The type cannot be changed. --filter '' removes the filter.

    The config and the action keep all values that the options do not change.
    """
    found = client.find("/triggers", trigger, kind="trigger")
    body = {**read_body(input_path, fields), **({"name": name} if name is not None else {})}
    changes = _config_changes(found, **when)
    if changes:
        body["config"] = {**body.get("config", found["config"]), **changes}
    if condition is not None:
        body["filter"] = condition or None
    body |= _action_fields(client, body.get("action", found["action"]), task, agent, workflow, values)
    if not body:
        raise click.UsageError("nothing to change; give --input, --field or another option")
    changed = client.send("PUT", f"/triggers/{found['id']}", body=body)
    lines = [f"Changed {changed['name']}."]
    if changed["next_fire_at"] is not None:
        lines.append(f"It fires next at {changed['next_fire_at']}.")
    if not changed["enabled"]:
        lines.append(f"It is disabled. Enable it: corral triggers toggle {shlex.quote(changed['name'])} --on")
    lines += _warning_lines(changed)
    print_value(changed, as_json=as_json, text="\n".join(lines))


@triggers_command_group.command("fire")
@trigger_argument
@payload_option
@client_command
def fire_trigger(client: ApiClient, *, trigger: str, payload: tuple[str, ...], as_json: bool) -> None:
    """Fire a trigger now, even if it is disabled."""
    found = _find(client, trigger)
    row = client.post(f"/triggers/{found}/fire", {"payload": parse_fields(payload)})
    text = f"The trigger is being fired. See the outcome: corral triggers history {found}"
    print_value(row, as_json=as_json, text=text)


@triggers_command_group.command("toggle")
@trigger_argument
@click.option(
    "--on/--off",
    "enabled",
    default=None,
    help="enable or disable the trigger (default: disable an enabled trigger and enable a disabled one)",
)
@client_command
def toggle_trigger(client: ApiClient, *, trigger: str, enabled: bool | None, as_json: bool) -> None:
    """Enable or disable a trigger."""
    body = {} if enabled is None else {"enabled": enabled}
    changed = client.post(f"/triggers/{_find(client, trigger)}/toggle", body)
    text = f"{changed['name']} is {'enabled' if changed['enabled'] else 'disabled'}."
    print_value(changed, as_json=as_json, text="\n".join([text, *_warning_lines(changed)]))


@triggers_command_group.command("rotate-secret")
@trigger_argument
@click.option(
    "--overlap",
    type=click.IntRange(0, 259_200),
    default=86_400,
    show_default=True,
    metavar="SECONDS",
    help="time in seconds for which the old secret or URL remains valid",
)
@client_command
def rotate_trigger_secret(client: ApiClient, *, trigger: str, overlap: int, as_json: bool) -> None:
    """Replace the secret of a webhook trigger, or its URL if its deliveries are not signed.

    The command prints the new secret or URL, which is not shown again, and the header in which callers sign.
    """
    found = client.find("/triggers", trigger, kind="trigger")
    made = client.post(f"/triggers/{found['id']}/rotate-secret", {"overlap_seconds": overlap})
    print_value(made, as_json=as_json, text="\n".join(_ingress_lines(client, {**found, **made})))


@triggers_command_group.command("delete")
@trigger_argument
@client_command
def delete_trigger(client: ApiClient, *, trigger: str, as_json: bool) -> None:
    """Delete a trigger. Its history remains available under its id."""
    trigger_id = _find(client, trigger)
    client.send("DELETE", f"/triggers/{trigger_id}")
    print_value({"deleted": trigger_id}, as_json=as_json, text=f"{trigger} was deleted.")


@triggers_command_group.command("history")
@trigger_argument
@click.option(
    "--status",
    type=click.Choice(STATUSES),
    multiple=True,
    help="list only slots with this status (a slot is a time, event or delivery that fires the trigger)",
)
@click.option(
    "--limit",
    type=click.IntRange(1, 200),
    default=50,
    show_default=True,
    help="maximum number of slots to list",
)
@client_command
def list_history(client: ApiClient, *, trigger: str, status: tuple[str, ...], limit: int, as_json: bool) -> None:
    """List the occasions on which a trigger was due, with their outcomes, newest first."""
    rows = client.get(f"/triggers/{_find(client, trigger)}/history", status=list(status), limit=limit)["items"]
    print_table(
        rows,
        HISTORY_COLUMNS,
        as_json=as_json,
        empty="The trigger has not fired yet.",
        colour_of="status",
        computed={
            "result": functools.partial(_result_text, ObjectNames(client)),
            "duration": lambda row: "-" if row["duration_ms"] is None else format_ms(row["duration_ms"]),
            "reason": lambda row: row["error"] or row["reason"] or "",
        },
    )


@triggers_command_group.command("test")
@trigger_argument
@payload_option
@click.option(
    "--days",
    type=click.IntRange(1, 30),
    help="number of past days to search for events on which the trigger would have fired",
)
@click.option("--next", "count", type=click.IntRange(1, 100), help="number of future firing times to list")
@client_command
def test_trigger(
    client: ApiClient, *, trigger: str, payload: tuple[str, ...], days: int | None, count: int | None, as_json: bool
) -> None:
    """Show what a trigger would do, without starting any work."""
    given = {"days": days, "next": count, "payload": parse_fields(payload) if payload else None}
    body = {name: value for name, value in given.items() if value is not None}
    tested = client.get(f"/triggers/{_find(client, trigger)}")
    found = client.post(f"/triggers/{tested['id']}/test", body)
    if found["times"] is not None:
        text = "\n".join(found["times"])
    elif found["events"] is not None:
        lines = [f"{event['ts']}  {event['event']}  {event['event_id']}" for event in found["events"]]
        text = "\n".join([*lines, *(["There are more."] if found["has_more"] else [])]) or "There are no such events."
    else:
        text = _test_result_text(tested, found)
    print_value(found, as_json=as_json, text=text)


def _ingress_lines(client: ApiClient, made: Mapping[str, Any]) -> list[str]:
    """Return the lines that show the new URL and secret of a webhook trigger, and the header for the signature."""
    lines = []
    if made["ingress_url"] is not None:
        lines.append(f"Its address, which is not shown again: {client.absolute(made['ingress_url'])}")
    if made["secret"] is not None:
        lines.append(f"Its secret, which is not shown again: {made['secret']}")
    if signature := _signature_text(made):
        lines.append(f"Callers sign each call in the {signature}.")
    return lines


def _signature_text(trigger: Mapping[str, Any]) -> str | None:
    """Return the header in which callers of a webhook trigger sign, and what they sign, or None if they do not sign."""
    config = trigger["config"]
    value = "the hexadecimal HMAC-SHA256 of the body under the secret"
    texts = {
        "hmac_sha256": f"header {config.get('signature_header') or 'X-Signature-256'}: {value}",
        "github": f"header X-Hub-Signature-256: {value}, as GitHub does",
        "standard": "headers webhook-id, webhook-timestamp and webhook-signature, as Standard Webhooks specifies",
    }
    return texts.get(config.get("auth")) if trigger["type"] == "webhook" else None


def _warning_lines(trigger: Mapping[str, Any]) -> list[str]:
    return [f"Warning: {each}" for each in trigger["warnings"]]


def _test_result_text(trigger: dict[str, Any], found: dict[str, Any]) -> str:
    """Return a message that says what a trigger would do with a payload, and that the test itself started nothing."""
    reasons = {
        "filtered": "its filter is false for this payload",
        "skipped_overlap": "the work that it started before is unfinished",
        "rate_limited": f"it has fired {trigger['max_fires_per_hour']} times within the last hour",
    }
    if found["would"] == "failed":
        text = f"The trigger would fail: {found['error']}"
    elif found["would"] == "fired":
        text = f"The trigger would start: {json.dumps(found['action'], ensure_ascii=False)}"
    else:
        text = f"The trigger would not start anything: {reasons[found['would']]}."
    if not trigger["enabled"]:
        text += "\nThe trigger is disabled, so only `corral triggers fire` fires it."
    text = "\n".join([text, *_warning_lines(trigger)])
    return text + "\nThis was a test: nothing was started."


def _action_fields(
    client: ApiClient,
    action: dict[str, Any],
    task: str | None,
    agent: str | None,
    workflow: str | None,
    values: tuple[str, ...],
) -> dict[str, Any]:
    """Return `{"action": …}` with the changes that the options specify, or an empty dictionary if there are none."""
    if task is not None and workflow is not None:
        raise click.UsageError("--task and --workflow cannot be used together")
    kind = action.get("type")
    if values and workflow is None and (task is not None or kind != "run_workflow"):
        raise click.UsageError("--value can be used only with --workflow")
    if agent is not None and (workflow is not None or (task is None and kind != "create_task")):
        raise click.UsageError("--agent can be used only with --task; the steps of a workflow name their agents")
    if task is not None or agent is not None:
        kept = action if kind in (None, "create_task") else {}
        given = {"title": task} if task is not None else {}
        if agent is not None:
            given["agent_id"] = client.find("/agents", agent, kind="agent")["id"]
        return {"action": {**kept, "type": "create_task", **given}}
    if workflow is None and not values:
        return {}
    changed = dict(action) if kind in (None, "run_workflow") else {}
    changed["type"] = "run_workflow"
    if workflow is not None:
        changed["workflow_id"] = client.find("/workflows", workflow, kind="workflow")["id"]
    if values:
        before = changed.get("input")
        changed["input"] = {**(before if isinstance(before, dict) else {}), **parse_fields(values)}
    return {"action": changed}


def _config_changes(
    trigger: dict[str, Any], *, cron: str | None, timezone: str | None, every: int | None, event: str | None
) -> dict[str, Any]:
    """Return the fields of a trigger's config that the options change, with their new values."""
    given = {
        "expression": ("cron", "--cron", cron),
        "timezone": ("cron", "--timezone", timezone),
        "seconds": ("interval", "--every", every),
        "event": ("event", "--event", event),
    }
    changes = {member: value for member, (_, _, value) in given.items() if value is not None}
    for member in changes:
        kind, option, _ = given[member]
        if trigger["type"] != kind:
            raise click.UsageError(
                f"{option} can be used only for triggers of the type {kind}, but {trigger['name']} has the type "
                f"{trigger['type']}, which cannot be changed; create another trigger"
            )
    return changes


def _state(trigger: Mapping[str, Any]) -> str:
    """Return a text that says whether a trigger is enabled and, if Corral disabled it, why."""
    if trigger["enabled"]:
        return "yes"
    reason = trigger["disabled_reason"]
    return f"no, {REASONS.get(reason, reason)}" if reason else "no"


def _action_text(names: ObjectNames, trigger: Mapping[str, Any]) -> str:
    """Describe the action, for example as `run_workflow Publish`.

    Names that are computed by expressions are omitted.
    """
    action = trigger["action"]
    if action["type"] == "create_task":
        agent = f" for {names.name('/agents', action['agent_id'])}" if parse_id(str(action.get("agent_id"))) else ""
        return f"create_task {action['title']}{agent}"
    for member, (path, field) in OBJECTS.items():
        if parse_id(str(action.get(member))) is not None:
            return f"{action['type']} {names.name(path, action[member], field)}"
    return f"{action['type']} {action['title']}" if "title" in action else str(action["type"])


def _result_text(names: ObjectNames, row: Mapping[str, Any]) -> str:
    """Describe the objects that the trigger started, with their names and ids."""
    told = []
    for member, identifier in (row["result"] or {}).items():
        if member == "run_id" and (run := names.read(f"/workflow-runs/{identifier}")) is not None:
            told.append(f"{names.name('/workflows', run['workflow_id'])} run {run['number']} ({identifier})")
        elif member in OBJECTS:
            path, field = OBJECTS[member]
            name = names.name(path, identifier, field)
            told.append(identifier if name == identifier else f"{name} ({identifier})")
        else:
            told.append(str(identifier))
    return ", ".join(told)


def _find(client: ApiClient, name: str) -> str:
    return str(client.find("/triggers", name, kind="trigger")["id"])


def _with_type_and_config(
    body: dict[str, Any],
    *,
    cron: str | None,
    timezone: str | None,
    every: int | None,
    event: str | None,
    webhook: bool,
    manual: bool,
) -> dict[str, Any]:
    """Return the body with the type and the config that the options specify.

    Other config fields in the body are kept.
    """
    given: list[tuple[str, dict[str, Any], bool]] = [
        ("cron", {"expression": cron, **({"timezone": timezone} if timezone else {})}, cron is not None),
        ("interval", {"seconds": every}, every is not None),
        ("event", {"event": event}, event is not None),
        ("webhook", {}, webhook),
        ("manual", {}, manual),
    ]
    named = [(kind, config) for kind, config, is_given in given if is_given]
    if len(named) > 1:
        raise click.UsageError("give only one of --cron, --every, --event, --webhook and --manual")
    if timezone is not None and cron is None:
        raise click.UsageError("--timezone can be used only with --cron")
    if not named:
        return body
    kind, config = named[0]
    if body.get("type", kind) != kind:
        raise click.UsageError(
            f"--field or --input sets the type {body['type']}, but another option sets the type {kind}"
        )
    return {**body, "type": kind, "config": {**body.get("config", {}), **config}}
