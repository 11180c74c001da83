"""The `corral plugins` command, which lists, enables, disables and purges installed plugins, and runs schedules."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import click

from corral.cli import logging_setup, output
from corral.cli.commands import command_names
from corral.cli.output import config_option, json_option
from corral.cli.registered_processes import ReloadResult, failed_reloads, request_reload, wait_for_reload
from corral.cli.server_connection import client_command
from corral.config.reader import load as load_config

if TYPE_CHECKING:
    from corral.cli.api_client import ApiClient
    from corral.config.model import Config
    from corral.plugins.record import PluginRecord

NEXT_START = "The change takes effect at the next start of the server."
RELOADED = "The server has reloaded."


@click.group("plugins", invoke_without_command=True)
@config_option
@json_option
@click.pass_context
def plugins_command(ctx: click.Context, config_path: Path | None, as_json: bool) -> None:
    """List, show, enable, disable or purge plugins, or run their schedules. Without a command, list the plugins."""
    logging_setup.configure("critical", "console")  # the states of the plugins show failures
    if ctx.invoked_subcommand is None:
        _list(config_path, as_json)


@plugins_command.command("list")
@config_option
@json_option
def list_(config_path: Path | None, as_json: bool) -> None:
    """List all installed plugins and their states.

    The plugins are imported but not started; `corral doctor` and `corral plugins show` start them.
    """
    _list(config_path, as_json)


@plugins_command.command("show")
@click.argument("name")
@config_option
@json_option
def show_plugin(name: str, config_path: Path | None, as_json: bool) -> None:
    """Show the state of one plugin, the reason for this state, and the plugin's contributions.

    An active plugin is first started on an empty database, so the command shows the state that the plugin would have in
    the server.
    """
    from corral.cli.enabled_plugins import find_plugin, installed_plugins, start_on_empty_database

    config = load_config(path=config_path)
    plugins = installed_plugins(config)
    item = find_plugin(plugins, name)
    contributed = _contribution_fields(item, plugins)
    if item.active:
        started = start_on_empty_database(config, name)
        item.become(started.state, started.reason)
    facts = {**_plugin_fields(item), **contributed}
    output.print_fields(facts, {name.replace("_", " "): value for name, value in facts.items()}, as_json=as_json)


@plugins_command.command("enable")
@click.argument("name")
@config_option
@json_option
def enable(name: str, config_path: Path | None, as_json: bool) -> None:
    """Enable a plugin in corral.toml. Comments in the file are kept.

    The file is not changed if the plugin would fail or be blocked. If a third-party plugin breaks other
    rules of the plugin contract, it is enabled, and a warning names them.
    """
    from corral.cli.check import check_rules
    from corral.cli.enabled_plugins import enable as change

    path, changed, built_in = change(config_path, name)
    _print_change(name, "enabled", path, changed, as_json)
    if not changed or built_in:
        return
    broken = [row for row in check_rules(load_config(path=path), name) if row["result"] != "ok"]
    if broken:
        told = f"{name} breaks rules of the plugin contract, as `corral check {name}` shows; report them to its author:"
        lines = (f"  {row['rule']}: {row['detail']}" for row in broken)
        click.echo("\n".join([f"{click.style('warning', fg='yellow')}: {told}", *lines]), err=True)


@plugins_command.command("disable")
@click.argument("name")
@config_option
@json_option
def disable(name: str, config_path: Path | None, as_json: bool) -> None:
    """Disable a plugin in corral.toml. Comments in the file and the plugin's data are kept."""
    from corral.cli.enabled_plugins import disable as change

    path, changed, stops = change(config_path, name)
    if changed:
        click.echo(f"{click.style('warning', fg='yellow')}: {stops}", err=True)
    _print_change(name, "disabled", path, changed, as_json)


@plugins_command.command("run")
@click.argument("name")
@click.argument("schedule")
@client_command
def run_schedule(client: ApiClient, name: str, schedule: str, as_json: bool) -> None:
    """Run a plugin's schedule now, for example `corral plugins run echo echo.report`.

    The server runs the schedule. This command requires an admin's session; sign in with `corral login`.
    """
    path = f"/plugins/{quote(name, safe='')}/schedules/{quote(schedule, safe='')}/run"
    found = client.send("POST", path)
    output.print_value(found, as_json=as_json, text=_run_result(name, found))
    if found["error"] and not found["running"]:
        raise SystemExit(1)


def _run_result(plugin: str, found: dict[str, Any]) -> str:
    if found["running"]:
        return f"{found['name']} is still running; `corral api GET /plugins/{plugin}` shows its result."
    if found["error"]:
        return f"{found['name']} failed: {found['error']}"
    return f"{found['name']} ran. It runs again at {found['next_at']} ({found['timing']})."


@plugins_command.command("purge")
@click.argument("name")
@config_option
@json_option
def purge(name: str, config_path: Path | None, as_json: bool) -> None:
    """Permanently drop all tables of a disabled plugin, after you type its name to confirm."""
    from corral.cli.enabled_plugins import purge as drop
    from corral.cli.enabled_plugins import tables_of
    from corral.database.connect import connect

    config = load_config(path=config_path)
    known = _check_purge(config, name)
    database = connect(config.database.url)
    try:
        tables = tables_of(database, name, known)
        if not tables:
            raise click.ClickException(f"the plugin {name} has no tables in this database")
        click.echo(f"This permanently drops the tables {', '.join(tables)} and all their rows.", err=True)
        typed = click.prompt("Type the name of the plugin to confirm", err=True)
        if typed.strip() != name:
            raise click.ClickException(f"the name that you typed is not {name}; no table was dropped")
        dropped = drop(database, name, known)
    finally:
        database.close()
    output.print_value(
        {"name": name, "dropped": dropped}, as_json=as_json, text=f"Dropped the tables {', '.join(dropped)}."
    )


def _check_purge(config: Config, name: str) -> list[str]:
    """Check that the plugin can be purged, and return the names of all known plugins.

    Raise `ClickException` if the plugin is protected or not disabled.
    """
    from corral.cli.enabled_plugins import installed_plugins

    plugins = installed_plugins(config)
    item = next((item for item in plugins if item.name == name), None)  # None: an uninstalled plugin may be purged too
    if item is not None and item.protected:
        raise click.ClickException(
            f"{name} is protected and cannot be purged, because the installation is not secure without it"
        )
    if item is not None and item.state != "disabled":
        raise click.ClickException(f"{name} is {item.state}; run `corral plugins disable {name}` first")
    return [item.name for item in plugins]


def _list(config_path: Path | None, as_json: bool) -> None:
    from corral.cli.enabled_plugins import installed_plugins

    rows = [_plugin_fields(item) for item in installed_plugins(load_config(path=config_path))]
    output.print_table(
        rows,
        ("name", "state", "version", "distribution", "reason"),
        as_json=as_json,
        colour_of="state",
        computed={"reason": lambda row: reason_in_words(row["name"], row["reason"])},
    )


def reason_in_words(name: str, reason: str | None) -> str | None:
    """Return the reason for the state of a plugin, with the remedy if there is one."""
    words = {
        "config": f"not enabled in corral.toml; enable it: corral plugins enable {name}",
        "admin": f"disabled by an admin; enable it: corral plugins enable {name}",
        "safe mode": "not loaded in safe mode",
    }
    return words.get(reason or "", reason)


def _plugin_fields(item: PluginRecord) -> dict[str, Any]:
    found, kind = item.found, item.kind
    return {
        "name": item.name,
        "state": item.state,
        "reason": item.reason,
        "title": kind.title() if kind else None,
        "version": found.version,
        "distribution": found.distribution,
        "author": found.author or None,
        "license": found.license or None,
        "built_in": found.built_in,
        "protected": item.protected,
        "requires": list(item.requires),
        "wants": list(kind.wants) if kind else [],
    }


def _contribution_fields(item: PluginRecord, plugins: list[PluginRecord]) -> dict[str, Any]:
    migrations = item.migrations()
    return {
        "description": item.kind.description() if item.kind else None,
        "required_by": [other.name for other in plugins if item.name in other.requires],
        "permissions": [each.name for each in item.kind.permissions] if item.kind else [],
        "routes": [route.label for group in item.contributions_to("corral_routes") for route in group],
        "tables": [model._meta.table_name for model in item.contributions_to("corral_models")],
        "events": [each.event for each in item.contributions_to("corral_events")],
        "jobs": [each.name for each in item.contributions_to("corral_jobs")],
        "schedules": [each.name for each in item.contributions_to("corral_schedules")],
        "subscribers": [each.name for each in item.contributions_to("corral_subscribers")],
        "settings": [each.name for each in item.contributions_to("corral_settings")],
        "health_checks": [each.name for each in item.contributions_to("corral_health_checks")],
        "metrics": [each.name for each in item.contributions_to("corral_metrics")],
        "commands": command_names(item.found) if item.kind else [],
        **_contributions_to_plugins(item),
        "migrations": sorted(path.stem for path in migrations.directory.glob("[0-9]*.py")) if migrations else [],
    }


def _contributions_to_plugins(item: PluginRecord) -> dict[str, list[str]]:
    """Return the names of a plugin's contributions to hooks of other plugins, such as its tools, keyed by hook."""
    from corral import hookspecs

    return {
        hook.removeprefix("corral_"): [_label(each) for each in items]
        for hook, items in sorted(item.contributed.items())
        if not hasattr(hookspecs, hook)
    }


def _label(item: Any) -> str:
    """Return the label of a contribution: its name, its type if it is a workflow step, or the name of its class."""
    named = getattr(item, "name", None) or getattr(item, "type", None) or getattr(item, "__name__", None)
    return str(named or type(item).__name__)


def _print_change(name: str, state: str, path: Path, changed: bool, as_json: bool) -> None:
    """Print the result of a change.

    If the configuration file changed or the last reload failed, reload the server processes on this machine and wait
    for the results. Exit with status 1 if a process could not reload, or if the plugin failed in a reloaded process.
    """
    data_dir = load_config(path=path).data_dir
    asked = request_reload(data_dir) if changed or failed_reloads(data_dir) else {}
    if asked:
        click.echo("Waiting for the server to reload.", err=True)
    reloads = wait_for_reload(data_dir, asked)
    failures = [told for each in reloads if (told := _failed_reload(each, name))]
    others = [line for each in reloads if each.load for line in each.load.plugins if not _is_about(line, name)]
    facts = {"name": name, "state": state, "file": str(path), "changed": changed, "reloading": len(asked)}
    when = "" if failures else RELOADED if asked else NEXT_START
    text = f"{name} is {state} in {path}. {when}"
    if not changed:
        text = f"{name} is already {state}; {path} was not changed. {when if asked else ''}"
    output.print_value({**facts, "failures": failures}, as_json=as_json, text=text.rstrip())
    for line in dict.fromkeys(others):
        click.echo(f"{click.style('warning', fg='yellow')}: {line}", err=True)
    if failures:
        undo = f"corral plugins {'disable' if state == 'enabled' else 'enable'} {name}"
        problems = "\n".join(dict.fromkeys(failures))
        raise click.ClickException(f"{problems}\nFix the cause and reload the plugins, or undo the change: {undo}")


def _failed_reload(reload: ReloadResult, name: str) -> str | None:
    """Describe why the change to the plugin is not in effect in the reloaded process, or return None if it is."""
    process, load = reload
    if load is None:
        return f"the process {process} has ended or has not reloaded in time; its log shows why"
    if load.error is not None:
        return f"the server could not reload, and continues with its old plugins: {load.error}"
    return next((line for line in load.plugins if _is_about(line, name)), None)


def _is_about(line: str, name: str) -> bool:
    return line.startswith(f"plugin {name} is ")
