"""The command group `corral settings`, which reads and changes the settings of a server."""

from __future__ import annotations

import difflib
import json
import shlex
import sys
from collections.abc import Mapping
from typing import Any

import click
from click.shell_completion import CompletionItem

from corral.cli.api_client import ApiClient, ApiClientError
from corral.cli.object_lookup import ObjectNames
from corral.cli.output import print_fields, print_table, print_value
from corral.cli.server_connection import client_command, open_client
from corral_core.accounts.api import USERS_PATH

PATH = "/settings"
COLUMNS = ("name", "value", "from", "title")
HISTORY_COLUMNS = ("at", "name", "before", "after", "by")
DEFAULT_MODEL, MODELS = "llm.default_model", "The models that providers list: corral api GET /llm/models"
SHOWN = 60  # characters of a value in a table
JSON_TYPES = ("list", "object")
Setting = dict[str, Any]


def _complete_setting_name(context: click.Context, parameter: click.Parameter, start: str) -> list[CompletionItem]:
    try:
        with open_client(context.params.get("server")) as client:
            found = client.get(f"{PATH}/")
    except (ApiClientError, click.ClickException):
        return []
    names = (f"{category}.{key}" for category, keys in found.items() for key in keys)
    return [CompletionItem(name) for name in names if name.startswith(start)]


setting_argument = click.argument("setting", shell_complete=_complete_setting_name)


@click.group("settings")
def settings_command_group() -> None:
    """Read and change the settings of a server, as an admin. SETTING is a name such as llm.default_model."""


@settings_command_group.command("list")
@click.argument("category", required=False)
@click.option("--changed", is_flag=True, help="list only settings whose value is not the default")
@client_command
def list_settings(client: ApiClient, *, category: str | None, changed: bool, as_json: bool) -> None:
    """List the settings in one category, or all settings, with their values."""
    found = client.get(f"{PATH}/", details="true")
    if category is not None and category not in found:
        raise ApiClientError(f"there is no category {category}; the categories are: {', '.join(found)}", 404)
    chosen = [row for name, keys in found.items() if category in (None, name) for row in keys.values()]
    print_table(
        [row for row in chosen if not changed or row["source"] != "default"],
        COLUMNS,
        as_json=as_json,
        empty="All settings have their defaults.",
        computed={
            "name": _name,
            "value": lambda row: _value_text(row["value"], limit=SHOWN),
            "from": lambda row: row["pinned_by"] or row["source"],
        },
    )


@settings_command_group.command("show")
@setting_argument
@client_command
def show_setting(client: ApiClient, *, setting: str, as_json: bool) -> None:
    """Show a setting with its type, bounds and default."""
    found = _find(client, setting)
    bounds = [f"at least {found['min']:g}"] if "min" in found else []
    bounds += [f"at most {found['max']:g}"] if "max" in found else []
    bounds += [f"one of {', '.join(found['enum'])}"] if "enum" in found else []
    bounds += ["or null"] if found["nullable"] else []
    shown = {
        "name": _name(found),
        "value": _value_text(found["value"]),
        "title": found["title"],
        "description": found["description"] if found["description"] != found["title"] else None,
        "type": ", ".join([found["type"], *bounds]),
        "default": _value_text(found["default"]),
        "pinned by": found["pinned_by"],
        "changed": found["updated_at"],
        "changed by": _person(ObjectNames(client), found["updated_by"]) if found["updated_by"] else None,
        "not valid": found["invalid"],
        "takes effect": "after a restart" if found["restart_required"] else "within 2 seconds",
    }
    print_fields(found, shown, as_json=as_json)


@settings_command_group.command("set")
@setting_argument
@click.argument("value", required=False)
@client_command
def set_setting(client: ApiClient, *, setting: str, value: str | None, as_json: bool) -> None:
    """Change a setting. Pass a list or an object as JSON. A secret is read from a prompt or from standard input."""
    found = _find(client, setting)
    changed = client.send("PUT", _path(found), body={"value": _new_value(found, value)})
    print_value(changed, as_json=as_json, text=_changed_text(changed, found["value"]))
    if not as_json and _name(found) == DEFAULT_MODEL and (warning := _model_warning(client, changed["value"])):
        click.echo(click.style("warning", fg="yellow") + f": {warning}", err=True)


@settings_command_group.command("reset")
@setting_argument
@client_command
def reset_setting(client: ApiClient, *, setting: str, as_json: bool) -> None:
    """Reset a setting to its default."""
    found = _find(client, setting)
    changed = client.post(f"{_path(found)}/reset", {})
    print_value(changed, as_json=as_json, text=_changed_text(changed, found["value"]))


@settings_command_group.command("history")
@click.argument("setting", required=False, shell_complete=_complete_setting_name)
@click.option(
    "--limit", type=click.IntRange(1, 200), default=20, show_default=True, help="maximum number of changes to list"
)
@client_command
def list_history(client: ApiClient, *, setting: str | None, limit: int, as_json: bool) -> None:
    """List the changes to one setting, or to all settings, newest first."""
    query: dict[str, Any] = {"limit": limit}
    if setting is not None:
        found = _find(client, setting)
        query |= {"category": found["category"], "key": found["key"]}
    names = ObjectNames(client)
    print_table(
        client.get(f"{PATH}/history", **query)["items"],
        HISTORY_COLUMNS,
        as_json=as_json,
        empty="Nothing has been changed.",
        computed={
            "name": _name,
            "before": lambda row: _value_text(row["from"], limit=SHOWN),
            "after": lambda row: _value_text(row["to"], limit=SHOWN),
            "by": lambda row: _person(names, row["by"]),
        },
    )


def _find(client: ApiClient, name: str) -> Setting:
    """Return the setting with this name, or raise an error that suggests a similar name."""
    found = client.get(f"{PATH}/", details="true")
    rows = {_name(row): row for keys in found.values() for row in keys.values()}
    if name in rows:
        return dict(rows[name])
    near = difflib.get_close_matches(name, rows, n=1)
    hint = f"; did you mean {near[0]}?" if near else f" at {client.url}; `corral settings list` shows all settings"
    raise ApiClientError(f"there is no setting {name}{hint}", 404)


def _new_value(setting: Setting, value: str | None) -> Any:
    """Return the new value from the command line or standard input.

    Numbers and booleans remain text, which the server converts.
    """
    name = _name(setting)
    if setting["type"] == "secret":
        if value is not None:
            raise click.UsageError(
                f"{name} is a secret, and other users can see the command line; omit the value to enter it at a prompt"
            )
        if sys.stdin.isatty():
            return click.prompt(setting["title"], hide_input=True, err=True)
        return sys.stdin.read().rstrip("\r\n")
    if value is None:
        raise click.UsageError(f"give the new value; `corral settings show {name}` describes the setting")
    if value == "null" and setting["nullable"]:
        return None
    if setting["type"] not in JSON_TYPES:
        return value
    try:
        return json.loads(value)
    except ValueError:
        example = '["a", "b"]' if setting["type"] == "list" else '{"a": 1}'
        raise click.UsageError(
            f"{name} is of the type {setting['type']}; give the value as JSON, such as '{example}'"
        ) from None


def _model_warning(client: ApiClient, model: str | None) -> str | None:
    """Return a warning if no provider lists the model, or if its provider cannot be called now.

    Otherwise, return None.
    """
    if model is None:
        return None
    try:
        found = client.get(f"/llm/models/{model}")
    except ApiClientError as error:
        if error.code != "model_not_found":
            return None
        return f"no provider lists the model {model}, so agents without a model of their own may fail. {MODELS}"
    return None if found["available"] else f"the provider of the model {model} cannot be called now. {MODELS}"


def _changed_text(setting: Setting, before: Any) -> str:
    """Return a sentence that states the current value of a setting."""
    name = _name(setting)
    text = f"{name} is {_value_text(setting['value'])}"
    text += f", the default (it was {_value_text(before)})." if setting["source"] == "default" else "."
    if setting["source"] != "default":
        text += f" Undo it: corral settings reset {shlex.quote(name)}"
    return f"{text}\nIt takes effect after a restart of the server." if setting["pending_restart"] else text


def _name(setting: Mapping[str, Any]) -> str:
    return f"{setting['category']}.{setting['key']}"


def _path(setting: Setting) -> str:
    return f"{PATH}/{setting['category']}/{setting['key']}"


def _value_text(value: Any, *, limit: int | None = None) -> str:
    text = value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)
    return text if limit is None or len(text) <= limit else f"{text[: limit - 1]}…"


def _person(names: ObjectNames, by: str | None) -> str:
    """Return the email address of a user.

    Return `by` unchanged if it does not identify a user, for example if it stands for an operator on the server.
    """
    return names.user(USERS_PATH, by)
