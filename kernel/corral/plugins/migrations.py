"""Applies migrations at boot, and selects the keyring that matches the stored rows.

If pending migrations may not be applied at boot, the process refuses to start. A plugin whose migration fails is marked
as `failed`.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable

import peewee

from corral.config.model import Config
from corral.crypto import Keyring
from corral.database.engine import Database
from corral.database.migrations import (
    KERNEL,
    PluginMigrations,
    SchemaTooNew,
    copy_before_migration,
    existing_tables,
    migrate,
    pending_scripts,
    schema_lock,
)
from corral.database.sealed_columns import SealedColumns
from corral.http.idempotency import IdempotencyRow
from corral.plugins.record import PluginRecord, block_dependants

log = logging.getLogger("corral.kernel")


class MigrationsPending(Exception):
    """Raised when migrations are pending but this process is not allowed to apply them (exit status 4)."""


def migrates_on_start(config: Config, kind: str) -> bool:
    """Return whether a process applies pending migrations at boot to a database that is not empty."""
    at_start = config.database.migrate_on_start
    return kind == "sqlite" if at_start is None else at_start


def migrations_of(records: Iterable[PluginRecord]) -> list[PluginMigrations]:
    """Return the migrations of the kernel and of the active plugins, in the order in which they must be applied."""
    return [KERNEL, *(found for record in records if record.active and (found := record.migrations()) is not None)]


def apply_migrations(database: Database, plugins: list[PluginRecord], config: Config) -> None:
    """Apply the pending migrations of the kernel and then of each active plugin, in order.

    If a script fails, its plugin is marked as `failed`. Raise `MigrationsPending` if migrations are pending and the
    configuration does not allow this process to apply them, unless the database is empty.
    """
    records = {record.name: record for record in plugins}
    with schema_lock(database) as engine:
        tables = existing_tables(engine)
        waiting = [
            (migrations, scripts)
            for migrations in migrations_of(plugins)
            if (scripts := _pending(engine, records.get(migrations.plugin), migrations, tables))
        ]
        block_dependants(plugins)
        if waiting and tables:
            if not migrates_on_start(config, database.kind):
                lines = "; ".join(f"{migrations.plugin}: {', '.join(scripts)}" for migrations, scripts in waiting)
                raise MigrationsPending(f"migrations are pending: {lines}; run `corral migrate`")
            if isinstance(engine, peewee.SqliteDatabase):
                copy_before_migration(engine)
        for migrations, _ in waiting:
            record = records.get(migrations.plugin)
            if record is None:
                migrate(engine, migrations)
            elif record.active:
                record.run_boot_step(migrate, engine, migrations)
                block_dependants(plugins)


def _pending(
    engine: peewee.Database, record: PluginRecord | None, migrations: PluginMigrations, tables: Collection[str]
) -> list[str]:
    """Return the pending scripts of the kernel (if `record` is None) or of a plugin.

    If the schema is newer than the code, a third-party plugin is marked as `failed`. For the kernel or a built-in
    plugin, `MigrationsPending` is raised.
    """
    try:
        return pending_scripts(engine, migrations, tables)
    except SchemaTooNew as error:
        if record is None or record.found.built_in:
            raise MigrationsPending(f"{error}; install the release that applied it") from None
        record.fail(error)
        return []


def sealed_columns(plugins: Iterable[PluginRecord]) -> SealedColumns:
    """Return the sealed (encrypted) columns of the kernel and of active plugins."""
    models = (model for record in plugins if record.active for model in record.contributions_to("corral_models"))
    return SealedColumns([IdempotencyRow, *models])


def select_keyring(keyring: Keyring, database: Database, plugins: Iterable[PluginRecord], config: Config) -> Keyring:
    """Return the keyring to use with the stored rows.

    The keyring is sealed if the stored rows are encrypted with other keys. If there is neither a key nor an encrypted
    row, a new key is created. If there is no key but there are encrypted rows, no key is created, because a new key
    would hide the loss of the correct key.
    """
    columns = sealed_columns(plugins)
    stored = database.run(lambda: columns.key_ids([key.id for key in keyring.keys]), read=True)
    if not keyring.keys and not stored:
        return Keyring.load(config, allow_create=True)
    keyring.update_seal_state(stored)
    return keyring


def disabled_by_admins(database: Database) -> dict[str, str]:
    """Return the reasons why admins have disabled plugins, keyed by plugin name. These plugins are not loaded."""

    def stored() -> dict[str, str]:
        if "plugin_admin_states" not in existing_tables(database.engine):
            return {}
        rows = database.engine.execute_sql("SELECT name, reason FROM plugin_admin_states WHERE state = 'disabled'")
        return {name: reason or "admin" for name, reason in rows.fetchall()}

    return database.run(stored, read=True)
