"""Reads and changes the list of plugins that an installation loads, and purges plugins' tables."""

from __future__ import annotations

import difflib
import os
import tempfile
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import peewee
import tomlkit

from corral.cli.command_kernels import temporary_kernel
from corral.cli.commands import COMMAND_GROUP
from corral.config.model import Config
from corral.config.reader import load as load_config
from corral.database.engine import Database
from corral.database.migrations import own_connection, schema_lock
from corral.plugins.discovery import discover
from corral.plugins.loading import load
from corral.plugins.record import PluginRecord

if TYPE_CHECKING:
    from tomlkit import TOMLDocument


def installed_plugins(config: Config) -> list[PluginRecord]:
    """Return the records of all installed plugins, sorted by name.

    The configuration file and the database determine the states of the plugins.
    """
    stored = read_disabled_plugins(config)
    loaded = load(discover(config), config)
    for item in loaded:
        if item.name in stored and item.active and not item.protected and item.name not in config.plugins.enabled:
            item.become("disabled", stored[item.name])
    return sorted(loaded, key=lambda item: item.name)


def read_disabled_plugins(config: Config) -> dict[str, str]:
    """Return the plugins that admins disabled through the API, and the reason for each.

    The result is empty if the database does not exist or cannot be read.
    """
    from corral.database.connect import connect
    from corral.database.migrations import own_connection

    url = config.database.url
    if url.startswith("sqlite:///") and not Path(url.removeprefix("sqlite:///")).exists():
        return {}
    database = connect(url)
    engine: Any
    try:
        with own_connection(database) as engine:
            rows = engine.execute_sql(
                "SELECT name, reason FROM plugin_admin_states WHERE state = 'disabled'"
            ).fetchall()
        return {name: reason or "admin" for name, reason in rows}
    except Exception:  # unreachable or empty, which `corral doctor` reports
        return {}
    finally:
        database.close()


def find_plugin(plugins: list[PluginRecord], name: str) -> PluginRecord:
    """Return the installed plugin with this name.

    If there is none, raise a `ClickException` that suggests a similar name."""
    for item in plugins:
        if item.name == name:
            return item
    near = difflib.get_close_matches(name, [item.name for item in plugins], 1)
    hint = f"; did you mean {near[0]}?" if near else "; `corral plugins list` shows all plugins"
    raise click.ClickException(f"no plugin named {name} is installed{hint}")


def enable(config_path: Path | None, name: str) -> tuple[Path, bool, bool]:
    """Enable a plugin in the configuration file.

    Return the path of the file, whether the file changed, and whether the plugin is built in.

    Raise `ClickException`, without changing the file, if the plugin would not be active afterwards.
    """
    config = load_config(path=config_path)
    item = find_plugin(installed_plugins(config), name)
    # A plugin that an admin disabled through the API stays disabled unless the file names it.
    names_it = not item.found.built_in or name in read_disabled_plugins(config)
    lists = {"enabled": name in config.plugins.enabled or names_it, "disabled": False}
    path, text, changed = _edit_config(config, config_path, name, lists)
    after = start_on_empty_database(_parse_config(path, text), name)
    if not after.active:
        raise click.ClickException(
            f"{name} was not enabled, because it would be {after.state}: {after.reason}{_requirements_hint(after)}"
        )
    if changed:
        _write(path, text)
    return path, changed, item.found.built_in


def disable(config_path: Path | None, name: str) -> tuple[Path, bool, str]:
    """Disable a plugin in the configuration file.

    Return the path of the file, whether the file changed, and a sentence that describes the consequences.

    Raise `ClickException` if the plugin is protected, or if a loaded plugin requires it. The plugin itself is not
    imported, because importing it might end the process.
    """
    config = load_config(path=config_path)
    installed = [PluginRecord(found=item) for item in discover(config)]
    uninstalled = name in config.plugins.enabled and name not in {item.name for item in installed}
    item = None if uninstalled else find_plugin(installed, name)
    if item is not None and item.protected:
        raise click.ClickException(
            f"{name} is protected and cannot be disabled, because the installation is not secure without it"
        )
    lists = {"enabled": False, "disabled": item is not None and item.found.built_in}
    path, text, changed = _edit_config(config, config_path, name, lists)
    after = [] if item is None else installed_plugins(_parse_config(path, text))
    dependants = [other.name for other in after if other.state == "blocked" and name in other.requires]
    if dependants:
        raise click.ClickException(f"{name} is required by {', '.join(dependants)}; disable these plugins first")
    if changed:
        _write(path, text)
    return path, changed, _describe_consequences(name, item, after)


def _describe_consequences(name: str, item: PluginRecord | None, others: Iterable[PluginRecord]) -> str:
    module = "" if item is None else item.found.module.rpartition(".")[0]
    points = metadata.entry_points(group=COMMAND_GROUP)
    commands = sorted(point.name for point in points if module and point.module.startswith(f"{module}."))
    without = [other.name for other in others if other.kind is not None and name in other.kind.wants]
    parts = [f"the API operations and background jobs of {name} stop"]
    if commands:
        parts.append(f"its commands are gone ({', '.join(commands)})")
    if without:
        parts.append(f"these plugins continue without it: {', '.join(without)}")
    return "; ".join(parts) + "."


def start_on_empty_database(config: Config, name: str) -> PluginRecord:
    """Start all plugins on an empty database and return the record of the plugin with this name.

    This verifies the plugin's imports, hooks, migrations and routes.
    """
    from corral.asgi.application import Application

    with temporary_kernel(config) as kernel:
        Application(kernel)
        return find_plugin(kernel.plugins, name)


def _requirements_hint(item: PluginRecord) -> str:
    missing = [name for name in item.requires if item.state == "blocked"]
    return f"; enable {', '.join(missing)} first" if missing else ""


def _edit_config(
    config: Config, config_path: Path | None, name: str, lists: Mapping[str, bool]
) -> tuple[Path, str, bool]:
    """Return the path of the configuration file, its new text, and whether the text changed.

    `lists` maps keys of `[plugins]` (`enabled`, `disabled`) to True if the list under this key must contain the plugin,
    and to False if it must not.
    """
    path = (config.path or config_path or Path(os.environ.get("CORRAL_CONFIG") or "corral.toml")).absolute()
    old = path.read_text("utf-8") if path.is_file() else ""
    document = tomlkit.parse(old)
    for key, wanted in lists.items():
        _set_listed(document, key, name, wanted)
    text = tomlkit.dumps(document)
    return path, text, text != old


def _set_listed(document: TOMLDocument, key: str, name: str, wanted: bool) -> None:
    table: Any = document.get("plugins")
    names: Any = None if table is None else table.get(key)
    present = names is not None and name in names
    if present == wanted:
        return
    if not wanted:
        names.remove(name)
        return
    if table is None:
        table = document["plugins"] = tomlkit.table()
    if names is None:
        table[key] = names = tomlkit.array()
    names.append(name)


def _parse_config(path: Path, text: str) -> Config:
    """Return the configuration that the text defines. Raise `StartupError` if the configuration is invalid."""
    with tempfile.NamedTemporaryFile("w", suffix=".toml", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        return load_config(path=Path(file.name))


def _write(path: Path, text: str) -> None:
    """Replace the file atomically and keep its mode; a new file is created with mode 0600."""
    mode = path.stat().st_mode & 0o777 if path.exists() else 0o600
    target = path.resolve()  # so that a symbolic link is kept
    try:
        with tempfile.NamedTemporaryFile(
            "w", dir=target.parent, prefix=f".{target.name}.", encoding="utf-8", delete=False
        ) as file:
            file.write(text)
            os.fchmod(file.fileno(), mode)
        os.replace(file.name, target)
    except OSError as error:
        raise click.ClickException(f"cannot write {path}: {error.strerror}") from None


# `NAMED`: kernel tables whose rows are named `<plugin>.<name>`. `STATES`: a table whose rows are named by plugin.
NAMED = ("kernel_consumers", "kernel_schedules", "kernel_jobs")
STATES = "plugin_admin_states"


def tables_of(database: Database, plugin: str, plugins: Iterable[str]) -> list[str]:
    """Return the tables of a plugin, including the table of its migration history.

    `plugins` contains the names of all known plugins, because a table such as `agent_x` may belong to the plugin
    `agent_x` or to the plugin `agent`.
    """
    with own_connection(database) as engine:
        return _tables(engine, plugin, plugins)


def purge(database: Database, plugin: str, plugins: Iterable[str]) -> list[str]:
    """Drop the tables of a plugin and return their names. The plugin must not be running.

    The plugin's rows in the kernel's tables are also deleted. The function runs in one transaction and holds the
    migration lock.
    """
    engine: Any
    with schema_lock(database) as engine, engine.atomic():
        names = _tables(engine, plugin, plugins)
        known = set(engine.get_tables())
        if database.kind == "sqlite":
            for name in sorted(names, key=len):  # a virtual table drops its shadow tables (longer names)
                engine.execute_sql(f'DROP TABLE IF EXISTS "{name}"')
        elif names:
            listed = ", ".join(f'"{name}"' for name in names)
            engine.execute_sql(f"DROP TABLE {listed} CASCADE")
        mark = engine.param
        for table in known.intersection(NAMED):
            beginning = f"{plugin}."
            sql = f"DELETE FROM {table} WHERE substr(name, 1, {len(beginning)}) = {mark}"  # noqa: S608  (a kernel table)
            engine.execute_sql(sql, (beginning,))
        if STATES in known:
            engine.execute_sql(f"DELETE FROM {STATES} WHERE name = {mark}", (plugin,))  # noqa: S608  (a kernel table)
        return names


def _tables(engine: peewee.Database, plugin: str, plugins: Iterable[str]) -> list[str]:
    """Return the tables whose names begin with the plugin's name, unless they belong to a plugin with a longer name.

    The longer names come from `plugins` and from the migration histories in the database.
    """
    tables = engine.get_tables()
    others = {*plugins, *(name.removesuffix("_migrations") for name in tables if name.endswith("_migrations"))}
    longer = tuple(f"{name}_" for name in others if name.startswith(f"{plugin}_"))
    own = [name for name in tables if name == plugin or name.startswith(f"{plugin}_")]
    return sorted(name for name in own if not (longer and name.startswith(longer)))
