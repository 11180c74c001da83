"""The plugins of an installation: which of them the configuration loads, and the tables that they own."""

from __future__ import annotations

import difflib
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import peewee
import tomlkit

from corral.cli.sessions import scratch
from corral.config.model import Config
from corral.config.reader import load as load_config
from corral.database.engine import Database
from corral.database.migrations import own_connection, schema_lock
from corral.plugins.discovery import discover
from corral.plugins.loading import load
from corral.plugins.record import PluginRecord

if TYPE_CHECKING:
    from tomlkit import TOMLDocument


def plugins_of(config: Config) -> list[PluginRecord]:
    """Every installed plugin with the state that file and database give it; by name."""
    stored = stored_states(config)
    loaded = load(discover(config), config)
    for item in loaded:
        if item.name in stored and item.active and not item.protected and item.name not in config.plugins.enabled:
            item.disable(stored[item.name])
    return sorted(loaded, key=lambda item: item.name)


def stored_states(config: Config) -> dict[str, str]:
    """What admins took out of service by the API, with the reason; nothing while there is no database to ask."""
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
    except Exception:  # unreachable or empty: `corral doctor` is who tells of that
        return {}
    finally:
        database.close()


def find(plugins: list[PluginRecord], name: str) -> PluginRecord:
    """The installed plugin of this name; else an error that tells the nearest name."""
    for item in plugins:
        if item.name == name:
            return item
    near = difflib.get_close_matches(name, [item.name for item in plugins], 1)
    hint = f"; the nearest is {near[0]}" if near else "; corral plugins list shows all"
    raise click.ClickException(f"no plugin {name} is installed{hint}")


def enable(config_path: Path | None, name: str) -> tuple[Path, bool]:
    """Have the file load the plugin; returns the file and whether it changed. Refused unless it then comes up."""
    config = load_config(path=config_path)
    item = find(plugins_of(config), name)
    # What an admin took out by the API stays out unless the file names it.
    names_it = not item.found.built_in or name in stored_states(config)
    lists = {"enabled": name in config.plugins.enabled or names_it, "disabled": False}
    path, text, changed = _edited(config, config_path, name, lists)
    after = _tried(_checked(path, text), name)
    if not after.active:
        raise click.ClickException(f"{name} was not enabled: it would be {after.state}: {after.reason}{_hint(after)}")
    if changed:
        _write(path, text)
    return path, changed


def disable(config_path: Path | None, name: str) -> tuple[Path, bool]:
    """Have the file not load the plugin; refused for protected ones and while one that is loaded requires it.

    It is not imported: one whose import ends the process must have this way out.
    """
    config = load_config(path=config_path)
    installed = [PluginRecord(found=item) for item in discover(config)]
    uninstalled = name in config.plugins.enabled and name not in {item.name for item in installed}
    item = None if uninstalled else find(installed, name)
    if item is not None and item.protected:
        raise click.ClickException(f"{name} is protected: nothing is safe without it")
    lists = {"enabled": False, "disabled": item is not None and item.found.built_in}
    path, text, changed = _edited(config, config_path, name, lists)
    after = [] if item is None else plugins_of(_checked(path, text))
    dependants = [other.name for other in after if other.state == "blocked" and name in other.requires]
    if dependants:
        raise click.ClickException(f"disable first what requires {name}: {', '.join(dependants)}")
    if changed:
        _write(path, text)
    return path, changed


def _tried(config: Config, name: str) -> PluginRecord:
    """The plugin as it comes up with all others on an empty database: its imports, hooks, migrations and routes."""
    from corral.asgi.application import Application

    with scratch(config) as kernel:
        Application(kernel)
        return find(kernel.plugins, name)


def _hint(item: PluginRecord) -> str:
    missing = [name for name in item.requires if item.state == "blocked"]
    return f". Enable first: {', '.join(missing)}" if missing else ""


def _edited(config: Config, config_path: Path | None, name: str, lists: Mapping[str, bool]) -> tuple[Path, str, bool]:
    """The file's path, its new text, and whether it differs. `lists`: whether each list is to have the name."""
    path = (config.path or config_path or Path(os.environ.get("CORRAL_CONFIG") or "corral.toml")).absolute()
    old = path.read_text("utf-8") if path.is_file() else ""
    document = tomlkit.parse(old)
    for key, wanted in lists.items():
        _put(document, key, name, wanted)
    text = tomlkit.dumps(document)
    return path, text, text != old


def _put(document: TOMLDocument, key: str, name: str, wanted: bool) -> None:
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


def _checked(path: Path, text: str) -> Config:
    """The configuration that the text would give; `Refused` as at a start."""
    with tempfile.NamedTemporaryFile("w", suffix=".toml", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        return load_config(path=Path(file.name))


def _write(path: Path, text: str) -> None:
    """Replace the file whole or not at all, with the mode it has."""
    mode = path.stat().st_mode & 0o777 if path.exists() else 0o600
    target = path.resolve()  # a link stays a link
    try:
        with tempfile.NamedTemporaryFile(
            "w", dir=target.parent, prefix=f".{target.name}.", encoding="utf-8", delete=False
        ) as file:
            file.write(text)
            os.fchmod(file.fileno(), mode)
        os.replace(file.name, target)
    except OSError as error:
        raise click.ClickException(f"{path}: {error.strerror}") from None


# Kernel tables whose rows are named `<plugin>.<what>`, and the one whose rows are named like the plugin.
NAMED = ("kernel_consumers", "kernel_schedules", "kernel_jobs")
STATES = "plugin_admin_states"


def tables_of(database: Database, plugin: str, plugins: Iterable[str]) -> list[str]:
    """The plugin's tables, history included. `plugins`: all known names: `agent_x` may be a plugin beside `agent`."""
    with own_connection(database) as engine:
        return _tables(engine, plugin, plugins)


def purge(database: Database, plugin: str, plugins: Iterable[str]) -> list[str]:
    """Drop them, in one transaction under the lock of migrations; returns their names. The plugin must not run."""
    engine: Any
    with own_connection(database) as engine, schema_lock(engine), engine.atomic():
        names = _tables(engine, plugin, plugins)
        known = set(engine.get_tables())
        if database.kind == "sqlite":
            for name in sorted(names, key=len):  # a virtual table takes its shadows, whose names are longer, with it
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
    """By prefix, but none of a plugin whose longer name begins alike, installed or once migrated here."""
    tables = engine.get_tables()
    others = {*plugins, *(name.removesuffix("_migrations") for name in tables if name.endswith("_migrations"))}
    longer = tuple(f"{name}_" for name in others if name.startswith(f"{plugin}_"))
    own = [name for name in tables if name == plugin or name.startswith(f"{plugin}_")]
    return sorted(name for name in own if not (longer and name.startswith(longer)))
