"""The `corral template` commands, which manage templates and their installations from a terminal."""

from __future__ import annotations

import contextlib
import json
import shlex
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, TypeVar

import click

from corral.cli.api_client import ApiClient, ApiClientError
from corral.cli.output import print_fields, print_table, print_value
from corral.cli.request_body import parse_fields, read_body
from corral.cli.server_connection import client_command
from corral.ids import parse_id

F = TypeVar("F", bound=Callable[..., Any])
Json = dict[str, Any]

COLUMNS = ("slug", "version", "category", "source", "installable", "description")
INSTALLED_COLUMNS = ("slug", "version", "status", "version_available", "created_at", "id")
OBJECT_COLUMNS = ("kind", "name", "action", "key")
template_argument = click.argument("template")
installation_argument = click.argument("installation", metavar="SLUG|ID")
manifest_argument = click.argument(
    "manifest", type=click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path)
)
parameter_option = click.option(
    "-p",
    "--parameter",
    "parameters",
    multiple=True,
    metavar="KEY=VALUE",
    help="value of a template parameter, as KEY=TEXT or KEY:=JSON; repeatable",
)
version_option = click.option("--version", "version", help="version of the template (default: the latest version)")
dry_run_option = click.option("--dry-run", is_flag=True, help="show the changes without making them")


def _installation_options(command: F) -> F:
    """Add the options that `corral template plan` and `corral template install` share."""
    options = (
        parameter_option,
        version_option,
        click.option("--prefix", default="", help="prefix for the names of all created objects"),
        click.option(
            "--secret",
            "secrets",
            multiple=True,
            metavar="NAME=VAULT_NAME",
            help="secret in the vault to use for the template's secret NAME; repeatable",
        ),
        click.option(
            "--on-conflict",
            type=click.Choice(("rename", "fail", "skip")),
            default="rename",
            show_default=True,
            help="what to do if an object with the same name exists",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


@click.group("template")
def template_command_group() -> None:
    """Install and create templates for agent teams. TEMPLATE is a slug, such as pr-reviewer."""


@template_command_group.command("list")
@click.option("--category", help="list only templates in this category")
@click.option("--search", help="list only templates whose name, description or tags contain this text")
@client_command
def list_templates(client: ApiClient, *, category: str | None, search: str | None, as_json: bool) -> None:
    """List all templates."""
    query = {name: value for name, value in (("category", category), ("search", search)) if value}
    print_table(list(client.pages("/marketplace/templates", **query)), COLUMNS, as_json=as_json, empty="No templates.")


@template_command_group.command("show")
@template_argument
@version_option
@click.option("--manifest", "is_manifest", is_flag=True, help="print the template's manifest as JSON")
@client_command
def show_template(client: ApiClient, *, template: str, version: str | None, is_manifest: bool, as_json: bool) -> None:
    """Show a template, the objects that it would create, and the resources that it may use."""
    with _explain_template_not_found(client, template, version):
        found = client.get(f"/marketplace/templates/{template}", **({"version": version} if version else {}))
    if is_manifest:
        click.echo(json.dumps(found["manifest"], indent=2, ensure_ascii=False))
        return
    properties, required = found["parameters"].get("properties", {}), found["parameters"].get("required", ())
    shown = {
        "name": found["name"],
        "version": found["version"],
        "source": found["source"],
        "description": found["description"],
        "creates": [f"{each['kind']} {each['title']}" for each in found["resources"]],
        "tools": found["permissions"]["tools"],
        "secrets": found["permissions"]["secrets"],
        "hosts": found["permissions"]["egress"],
        "parameters": "\n".join(_parameter_text(name, each, required) for name, each in properties.items()),
        "problems": [each["detail"] for each in found["problems"]],
        "findings": [f"{each['severity']}: {each['detail']}" for each in found["findings"]],
        "readme": found["readme"],
    }
    print_fields(found, shown, as_json=as_json)


@template_command_group.command("plan")
@template_argument
@_installation_options
@client_command
def plan_template(client: ApiClient, *, template: str, as_json: bool, **options: Any) -> None:
    """Show what an installation would create, and which requirements are missing. Nothing is created."""
    with (
        _explain_template_not_found(client, template, options["version"]),
        _explaining_parameters(options["parameters"]),
    ):
        plan = client.post(f"/marketplace/templates/{template}/install", {**_body(**options), "dry_run": True})
    if as_json:
        print_value(plan, as_json=True, text="")
        return
    print_table(plan["objects"], OBJECT_COLUMNS, as_json=False, empty="Nothing would be created.")
    _print_missing(plan)


@template_command_group.command("install")
@template_argument
@_installation_options
@client_command
def install_template(client: ApiClient, *, template: str, as_json: bool, **options: Any) -> None:
    """Install a template. Nothing that it creates is active until you start or enable it."""
    with (
        _explain_template_not_found(client, template, options["version"]),
        _explaining_parameters(options["parameters"]),
    ):
        made = client.post(f"/marketplace/templates/{template}/install", _body(**options))
    if as_json:
        print_value(made, as_json=True, text="")
        return
    print_table(made["created"], ("kind", "name", "id"), as_json=False)
    for each in made["created"]:
        for name, value in each["once"].items():
            shown = client.absolute(value) if name.endswith("_url") else value
            click.echo(f"{each['name']}, {name.replace('_', ' ')} (shown once): {shown}")
    _print_missing(made)
    click.echo(f"Installed {made['slug']} {made['version']} ({made['id']}).")
    click.echo(f"Remove it again: corral template uninstall {made['id']}")
    for line in _activation_lines(client, made["created"]):
        click.echo(line)


@template_command_group.command("installations")
@client_command
def list_installations(client: ApiClient, *, as_json: bool) -> None:
    """List installations, newest first."""
    print_table(
        list(client.pages("/marketplace/installations")),
        INSTALLED_COLUMNS,
        as_json=as_json,
        empty="Nothing is installed. Install a template: corral template install SLUG",
        colour_of="status",
    )


@template_command_group.command("upgrade")
@installation_argument
@parameter_option
@version_option
@dry_run_option
@client_command
def upgrade_installation(
    client: ApiClient,
    *,
    installation: str,
    parameters: tuple[str, ...],
    version: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Upgrade an installation. Fields that people have edited keep their values."""
    body: Json = {"parameters": parse_fields(parameters), "dry_run": dry_run}
    path = f"/marketplace/installations/{_find_installation(client, installation)}/upgrade"
    with _explain_not_found(client, installation), _explaining_parameters(parameters):
        result = client.post(path, {**body, **({"version": version} if version else {})})
    change, create = ("would change", "would create") if dry_run else ("changed", "created")
    lines = [f"{change} {each['kind']} {each['name']}: {', '.join(each['fields'])}" for each in result["updated"]]
    for each in result["kept_local"]:
        lines.append(f"{_kept_text(dry_run)} {each['kind']} {each['name']}: {', '.join(each['fields'])}")
        lines += [line for field in each["values"] for line in _conflict_lines(field)]
    lines += [f"{create} {each['kind']} {each['name']}" for each in result["created"]]
    lines += _removal_lines(result, dry_run=dry_run)
    done = "Would change" if dry_run else "Changed"
    if _version_order(result["version"]) > _version_order(result["upgraded_from"]):
        done = "Would upgrade" if dry_run else "Upgraded"
    lines.append(f"{done} from {result['upgraded_from']} to {result['version']}.")
    print_value(result, as_json=as_json, text="\n".join(lines))
    for warning in () if as_json else result["warnings"]:
        click.echo(f"warning: {warning}", err=True)


@template_command_group.command("uninstall")
@installation_argument
@click.option("--force", is_flag=True, help="also remove objects that people have edited")
@dry_run_option
@client_command
def uninstall_installation(client: ApiClient, *, installation: str, force: bool, dry_run: bool, as_json: bool) -> None:
    """Remove the objects of an installation, except objects that people have edited and objects that are in use."""
    body = {"force": force, "dry_run": dry_run}
    path = f"/marketplace/installations/{_find_installation(client, installation)}/uninstall"
    with _explain_not_found(client, installation):
        result = client.post(path, body)
    lines = _removal_lines(result, dry_run=dry_run)
    if {each["reason"] for each in result["kept"]} & REPEATABLE and not dry_run:
        again = "corral template uninstall " + installation + (" --force" if force else "")
        lines.append(f"Then remove the rest: {again}")
    text = "\n".join(lines) or "There is nothing left to remove."
    print_value(result, as_json=as_json, text=text)


@template_command_group.command("validate")
@manifest_argument
@client_command
def validate_manifest(client: ApiClient, *, manifest: Path, as_json: bool) -> None:
    """Check a manifest. The exit status is 1 if the manifest has errors."""
    found = client.post("/marketplace/templates/validate", read_body(manifest, ()))
    lines = [f"{each['pointer']}: {each['detail']}" for each in found["errors"]]
    lines += [f"{each['severity']}: {each['pointer']}: {each['detail']}" for each in found["findings"]]
    if found["valid"]:
        lines.append("The manifest is valid.")
    print_value(found, as_json=as_json, text="\n".join(lines))
    if not found["valid"]:
        raise SystemExit(1)


@template_command_group.command("upload")
@manifest_argument
@client_command
def upload_manifest(client: ApiClient, *, manifest: Path, as_json: bool) -> None:
    """Upload a manifest, so that everyone can install it. Only admins may do this."""
    made = client.post("/marketplace/templates", read_body(manifest, ()))
    told = f"Uploaded {made['slug']} {made['version']}. Install it: corral template install {made['slug']}"
    print_value(made, as_json=as_json, text=told)


@template_command_group.command("delete")
@template_argument
@client_command
def delete_template(client: ApiClient, *, template: str, as_json: bool) -> None:
    """Delete all versions of an uploaded template. Its installations remain. Only admins may do this."""
    with _explain_template_not_found(client, template):
        client.send("DELETE", f"/marketplace/templates/{template}")
    print_value({"deleted": template}, as_json=as_json, text=f"Deleted {template}.")


@template_command_group.command("export")
@click.argument("slug")
@click.option("--name", required=True, help="name of the template")
@click.option("--agent", "agents", multiple=True, help="name or id of an agent to export; repeatable")
@click.option("--workflow", "workflows", multiple=True, help="name or id of a workflow to export; repeatable")
@click.option("--trigger", "triggers", multiple=True, help="name or id of a trigger to export; repeatable")
@click.option("--version", "version", default="1.0.0", show_default=True, help="version of the template")
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="file to which the manifest is written (default: standard output)",
)
@client_command
def export_template(
    client: ApiClient,
    *,
    slug: str,
    name: str,
    agents: tuple[str, ...],
    workflows: tuple[str, ...],
    triggers: tuple[str, ...],
    version: str,
    output: Path | None,
    as_json: bool,
) -> None:
    """Create a manifest from agents, workflows and triggers. Without --output, the manifest is printed."""
    body = {
        "meta": {"slug": slug, "name": name, "version": version},
        "agent_ids": [client.find("/agents", each, kind="agent")["id"] for each in agents],
        "workflow_ids": [client.find("/workflows", each, kind="workflow")["id"] for each in workflows],
        "trigger_ids": [client.find("/triggers", each, kind="trigger")["id"] for each in triggers],
    }
    manifest = client.post("/marketplace/export", body)
    text = json.dumps(manifest, indent=2, ensure_ascii=False)
    if output is None:
        click.echo(text)
        return
    output.write_text(f"{text}\n", encoding="utf-8")
    print_value(manifest, as_json=as_json, text=f"Wrote {output}. Check it: corral template validate {output}")


@contextlib.contextmanager
def _explaining_parameters(parameters: tuple[str, ...]) -> Iterator[None]:
    """If the server rejects a parameter that was sent as a string, explain in the error how to pass other types."""
    try:
        yield
    except ApiClientError as error:
        refused = {each["pointer"].removeprefix("/parameters/") for each in (error.problem or {}).get("errors") or ()}
        texts = [name for name, mark, _ in (each.partition("=") for each in parameters) if mark and name in refused]
        if not texts:
            raise
        hint = f"{texts[0]} was given as text; write -p {texts[0]}:=VALUE for a number, true, false or a list"
        raise ApiClientError(f"{error}\n  {hint}", error.status, error.problem) from None


def _body(
    *,
    parameters: tuple[str, ...],
    version: str | None,
    prefix: str,
    secrets: tuple[str, ...],
    on_conflict: str,
) -> Json:
    body: Json = {
        "parameters": parse_fields(parameters),
        "name_prefix": prefix,
        "secrets_map": parse_fields(secrets),
        "on_conflict": on_conflict,
    }
    return {**body, **({"version": version} if version else {})}


BOUNDS = {
    "minimum": "at least",
    "exclusiveMinimum": "more than",
    "maximum": "at most",
    "exclusiveMaximum": "less than",
    "multipleOf": "a multiple of",
    "minLength": "characters at least",
    "maxLength": "characters at most",
    "minItems": "items at least",
    "maxItems": "items at most",
    "pattern": "pattern",
    "format": "format",
}
"""Maps JSON Schema keywords that restrict a parameter to their descriptions for people."""


def _parameter_text(name: str, schema: Json, required: Collection[str]) -> str:
    """Describe a parameter in one line.

    Example: `retries: integer, at least 0, default 3 (Number of retries)`.
    """
    kind = schema.get("type", "any value")
    facts = ["required"] if name in required and "default" not in schema else []
    facts.append(" or ".join(kind) if isinstance(kind, list) else kind)
    if "enum" in schema:
        facts.append(f"one of {', '.join(map(_value_text, schema['enum']))}")
    facts += [f"{words} {_value_text(schema[word])}" for word, words in BOUNDS.items() if word in schema]
    if "default" in schema:
        facts.append(f"default {_value_text(schema['default'])}")
    about = schema.get("description") or schema.get("title")
    return f"{name}: {', '.join(facts)}{f' ({about})' if about else ''}"


def _value_text(value: Any) -> str:
    """Return a value in the form that `--parameter` accepts: strings unchanged, and any other value as JSON."""
    return (value or '""') if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _print_missing(found: Json) -> None:
    missing = found["missing"]
    for plugin in found.get("missing_plugins", ()):
        click.echo(f"missing: the plugin {plugin}", err=True)
    for secret in missing["secrets"]:
        command = f"corral api POST /secrets -f name={secret} -f value=@-"
        click.echo(f"missing: the secret {secret}; an admin must create it: {command}", err=True)
    for grant in missing["grants"]:
        consumer = grant["consumer"] or f"the {grant['kind']} {grant['key']}"
        click.echo(
            f"missing: the permission of {consumer} to use the secret {grant['secret']}; an admin must grant it",
            err=True,
        )
    for warning in found["warnings"]:
        click.echo(f"warning: {warning}", err=True)


def _removal_lines(result: Json, *, dry_run: bool) -> list[str]:
    remove = "would remove" if dry_run else "removed"
    lines = [f"{remove} {each['kind']} {each['name']}" for each in result["removed"]]
    return lines + [
        f"{_kept_text(dry_run)} {each['kind']} {each['name']}: {_reason_text(each)}" for each in result["kept"]
    ]


def _kept_text(dry_run: bool) -> str:
    return "would keep" if dry_run else "kept"


SHOWN_VALUE = 200  # characters of a value in a list of kept fields


def _conflict_lines(kept: Json) -> list[str]:
    """Return lines that show the installed, new and current values of a field that an upgrade does not change.

    People have edited this field, and the new template changes it too.
    """
    values = (("installed", kept["installed"]), ("new", kept["new"]), ("current, kept", kept["current"]))
    return [f"  {kept['field']}:", *(f"    {name + ':':<15}{_short_text(value)}" for name, value in values)]


def _short_text(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= SHOWN_VALUE else f"{text[: SHOWN_VALUE - 1]}…"


def _version_order(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]


REASONS = {
    "edited": "edited. Remove it anyway: --force",
    "running": "running",
    "in_use": "in use by an object that stays",
    "reused": "existed before the installation",
    "plugin_required": "the plugin for this kind of object is not active",
}
REPEATABLE = {"running", "in_use", "plugin_required"}
"""Temporary reasons for keeping an object. When they no longer apply, the uninstall command can be repeated."""
ENDS = {
    "agent": "Stop it: corral agents stop",
    "workflow": "See what runs: corral workflows runs",
    "trigger": "See what it does: corral triggers history",
}
"""For each kind of object, the command that stops the object or shows its activity. The object's name is appended."""


BEGINNINGS = {
    "agent": "Start the agent: corral agents start",
    "trigger": "Enable the trigger: corral triggers toggle --on",
    "notification_rule": "Enable the rule: corral notifications edit-rule --enable",
}
"""For each kind of object, the command that activates an installed object. The object's name is appended."""


def _activation_lines(client: ApiClient, created: list[Json]) -> list[str]:
    """Return the commands, in order, that activate the installed objects."""
    triggers = [client.get(f"/triggers/{each['id']}") for each in created if each["kind"] == "trigger"]
    triggered = {trigger["action"].get("workflow_id"): trigger["name"] for trigger in triggers}
    lines = []
    for each in sorted(created, key=lambda each: each["kind"] == "trigger"):
        name = shlex.quote(each["name"])
        if each["kind"] == "workflow":
            wanted = _required_input(client.get(f"/workflows/{each['id']}"))
            lines.append(f"Run the workflow, which is a draft: corral workflows run {name}{wanted}")
            if each["id"] in triggered:
                why = f"so that the trigger {triggered[each['id']]} may run it"
                lines.append(f"Make the workflow active, {why}: corral workflows edit {name} -f status=active")
        elif each["kind"] in BEGINNINGS:
            lines.append(f"{BEGINNINGS[each['kind']]} {name}")
    return lines


def _required_input(workflow: Json) -> str:
    """Return the command-line options for the required input of a workflow.

    The placeholder for each value is the capitalized name of the input, or `JSON` for values that are not strings.
    """
    schema: Json = workflow["config"].get("input_schema") or {}
    choices = [*schema.get("anyOf", ()), *schema.get("oneOf", ())][:1]  # the first alternative is enough
    names = [name for part in (schema, *choices) for name in part.get("required", ())]
    return "".join(
        f" -i {shlex.quote(f'{name}={name.upper()}' if _is_text(schema, name) else f'{name}:=JSON')}" for name in names
    )


def _is_text(schema: Json, name: str) -> bool:
    return bool(schema.get("properties", {}).get(name, {}).get("type", "string") == "string")


def _reason_text(kept: Json) -> str:
    """Return the reason why an object was not removed and, if possible, the command that makes its removal possible."""
    reason = REASONS.get(kept["reason"], str(kept["reason"]))
    if kept["reason"] == "running" and kept["kind"] in ENDS:
        reason += f". {ENDS[kept['kind']]} {shlex.quote(kept['name'])}"
    return reason


def _explain_not_found(client: ApiClient, installation: str) -> contextlib.AbstractContextManager[None]:
    return client.explain_not_found("installation", installation, "corral template installations")


def _explain_template_not_found(
    client: ApiClient, template: str, version: str | None = None
) -> contextlib.AbstractContextManager[None]:
    return client.explain_not_found(
        "template", f"{template} {version}" if version else template, "corral template list"
    )


def _find_installation(client: ApiClient, name: str) -> str:
    """Return the id of an installation.

    `name` is the id, or the slug of a template that has only one installation.
    """
    if parse_id(name) is not None:
        return name
    found = [each for each in client.pages("/marketplace/installations") if each["slug"] == name.strip()]
    present = [each["id"] for each in found if each["status"] != "removed"]
    if len(present) == 1:
        return str(present[0])
    if present:
        raise ApiClientError(
            f"{name} is installed {len(present)} times; give one of these ids instead: {', '.join(present)}"
        )
    raise ApiClientError(
        f"there is no installation of {name} at {client.url}; `corral template installations` shows all installations",
        404,
    )
