"""Migrations at boot, which are applied, refused, or fail their plugin; and the keyring that fits the stored rows."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import peewee

from corral.config.model import Config
from corral.crypto import Keyring
from corral.database.engine import Database
from corral.database.migrations import Home, Newer, exclusive_start, keep_copy, migrate, pending_of, tables_of
from corral.database.sealed import SealedColumns
from corral.plugins.record import PluginRecord, block_dependants

log = logging.getLogger("corral.kernel")


class Pending(Exception):
    """Migrations wait and may not be applied by this start (exit status 4)."""


def migrates_on_start(config: Config, kind: str) -> bool:
    """Whether a start applies what is pending to a database that is not empty."""
    at_start = config.database.migrate_on_start
    return kind == "sqlite" if at_start is None else at_start


def apply_migrations(database: Database, plugins: list[PluginRecord], config: Config, allowed: bool | None) -> None:
    """Migrate each active plugin in order; a failing script makes its plugin `failed`."""
    if allowed is None:
        allowed = migrates_on_start(config, database.kind)
    with exclusive_start(database) as engine:
        homes = {item.name: home for item in plugins if item.active and (home := item.home()) is not None}
        waiting = {item.name: _waiting(engine, item, homes[item.name]) for item in plugins if item.name in homes}
        block_dependants(plugins)
        lines = "; ".join(f"{name}: {', '.join(scripts)}" for name, scripts in waiting.items() if scripts)
        if lines and not allowed and tables_of(engine):
            raise Pending(f"migrations wait; run corral migrate ({lines})")
        if lines and isinstance(engine, peewee.SqliteDatabase) and tables_of(engine):
            keep_copy(engine)
        for item in plugins:
            if item.active and waiting.get(item.name):
                item.attempt(migrate, database, homes[item.name])
                block_dependants(plugins)


def _waiting(engine: peewee.Database, loaded: PluginRecord, home: Home) -> list[str]:
    """Its pending scripts. A schema newer than a third-party plugin is that plugin's failure, else the start's."""
    try:
        return pending_of(engine, home)
    except Newer as error:
        if loaded.found.built_in:
            raise Pending(f"{error}; install the release that made it") from None
        loaded.fail(error)
        return []


def sealed_columns(plugins: Iterable[PluginRecord]) -> SealedColumns:
    """The sealed columns of active plugins."""
    return SealedColumns(model for loaded in plugins if loaded.active for model in loaded.contributed.models)


def unlock(
    keyring: Keyring, database: Database, plugins: Iterable[PluginRecord], config: Config, *, create: bool
) -> Keyring:
    """The keyring that fits the stored rows: sealed when they have other keys, with a new key when there are none.

    A new key over old rows would hide that the right one is lost, so with encrypted rows none is made.
    """
    columns = sealed_columns(plugins)
    stored = database.run(lambda: columns.key_ids([key.id for key in keyring.keys]), read=True)
    if create and not keyring.keys and not stored:
        made = Keyring.load(config, allow_create=True)
        log.warning("the master key is in %s: keep a copy of it apart from the backups of the database", made.source)
        return made
    keyring.note_stored(stored)
    return keyring


def taken_out(database: Database) -> dict[str, str]:
    """The plugins that admins have taken out of service, with the reason: they are not loaded."""

    def stored() -> dict[str, str]:
        if "plugin_admin_states" not in tables_of(database.engine):
            return {}
        rows = database.engine.execute_sql("SELECT name, reason FROM plugin_admin_states WHERE state = 'disabled'")
        return {name: reason or "admin" for name, reason in rows.fetchall()}

    return database.run(stored, read=True)
