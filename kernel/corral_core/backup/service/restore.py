"""Restores an installation from an archive into an empty SQLite or PostgreSQL database, in one transaction."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import msgspec
import peewee
from playhouse.migrations import Runner

from corral import clock
from corral.auth.principal import Principal
from corral.cli.database_snapshot import HISTORY, continue_numbering, insert_rows, long_transaction, models_of
from corral.config.model import Config
from corral.crypto import Keyring
from corral.database.connect import connect
from corral.database.dialect import execute
from corral.database.leases import Lease
from corral.database.migrations import (
    PluginMigrations,
    SchemaTooNew,
    existing_tables,
    migrate,
    pending_scripts,
    schema_lock,
)
from corral.database.unit import Unit, UnitContext, run_in_unit, write_collected
from corral.errors import StartupError
from corral.events.event import SystemAlert, emit
from corral.jobs.job import JobRow
from corral.kernel import Kernel
from corral.plugin import Audit, AuditEntry
from corral.plugins.discovery import discover
from corral.plugins.loading import load
from corral.plugins.migrations import migrations_of
from corral.plugins.record import PluginRecord
from corral.storage.blobs import BlobStore
from corral_core.backup.service.archive import Archive, Manifest

Progress = Callable[[str], None]


def with_all_plugins(config: Config) -> Config:
    """Return the configuration with all plugins enabled, because backups also contain the data of disabled plugins."""
    return msgspec.structs.replace(config, plugins=msgspec.structs.replace(config.plugins, disabled=()))


def restore(archive: Archive, config: Config, entry: UnitContext, by: Principal, tell: Progress) -> list[str]:
    """Restore an archive whose checksums have been verified. Return notes for the operator about the restored data.

    Raise `StartupError` if the database is not empty or a plugin is missing, and `SchemaTooNew` if the archive was
    written by a newer release.
    """
    config = with_all_plugins(config)
    database = connect(config.database.url)
    try:
        with schema_lock(database) as lock:
            if existing_tables(lock):
                raise StartupError("the database is not empty; restore into a new data folder or an empty database")
            records = load(discover(config), config)
            migrations = _check_schemas(archive.manifest, lock, records)
            kernel = Kernel(config, records, database, Keyring.load(config))
            kernel.wire()
            _restore_files(archive, kernel.container.get(BlobStore), tell)
            with long_transaction(database) as engine:
                _restore_tables(archive, engine, migrations, records, tell)
                unit = Unit(database, engine.connection(), entry, read_only=False)
                defects: list[str] = run_in_unit(unit, lambda: _adapt_and_record(kernel, unit, archive.manifest, by))
            return defects
    finally:
        database.close()


def _check_schemas(
    manifest: Manifest, engine: peewee.Database, records: list[PluginRecord]
) -> dict[str, PluginMigrations]:
    """Check that this release can restore the data of each plugin. Return the migrations of the active plugins.

    The result is keyed by plugin, in the order in which the migrations are applied.
    """
    migrations = {each.plugin: each for each in migrations_of(records)}
    if missing := sorted({*manifest.schemas} - {*migrations}):
        raise StartupError(
            *[f"{name}: the backup has data of this plugin, which is not installed or failed" for name in missing]
        )
    for name, scripts in manifest.schemas.items():
        if unknown := [script for script in scripts if script not in pending_scripts(engine, migrations[name], ())]:
            raise SchemaTooNew(
                f"{name}: the backup has {unknown[-1]}, which this release does not know; install release "
                f"{manifest.release} of Corral or a newer one"
            )
    return migrations


def _restore_files(archive: Archive, store: BlobStore, tell: Progress) -> None:
    """Store the files of the archive. Call this function before inserting the rows that refer to the files."""

    async def put_all() -> None:
        for key in archive.manifest.files:
            await store.put(key, _chunks(archive, key))

    if archive.manifest.files:
        asyncio.run(put_all())
        tell(f"{len(archive.manifest.files)} files")


async def _chunks(archive: Archive, key: str) -> AsyncIterator[bytes]:
    for chunk in archive.read_file(key):
        yield chunk


def _restore_tables(
    archive: Archive,
    engine: peewee.Database,
    migrations: dict[str, PluginMigrations],
    records: list[PluginRecord],
    tell: Progress,
) -> None:
    """Create the tables with the archive's schema, fill them, and then apply the migrations of this release."""
    manifest, models = archive.manifest, models_of(records)
    for name, each in migrations.items():
        for script in manifest.schemas.get(name, ()):
            Runner(engine, str(each.directory), table_name=f"{name}{HISTORY}").up(script)
    for table, entry in manifest.tables.items():
        insert_rows(engine, table, archive.read_table(table))
        if entry.rows:
            tell(f"{table}: {entry.rows} rows")
    for each in migrations.values():
        migrate(engine, each)
    for model in models.values():
        continue_numbering(engine, model)


def _adapt_and_record(kernel: Kernel, unit: Unit, manifest: Manifest, by: Principal) -> list[str]:
    """Adapt the restored rows, and record the restore. Return the defects that the restore steps found.

    Runs in the restore's unit of work.
    """
    Lease.delete().execute()
    JobRow.update(state="queued", lease=None, run_at=clock.now()).where(JobRow.state == "running").execute()
    _number_events()
    steps = [step for record in kernel.active for step in record.contributions_to("corral_restore_steps")]
    defects = [defect for step in steps if (defect := kernel.container.get(step).after_restore(by)) is not None]
    alert = SystemAlert(
        kind="restored",
        severity="critical" if defects else "warning",
        title="This installation was restored from a backup",
        detail=" ".join([f"The backup was made at {manifest.created_at}.", *defects]),
    )
    emit(alert, object=("backup", manifest.created_at))
    kernel.container.get(Audit).record(
        AuditEntry(
            action="backup.restored",
            object_type="backup",
            object_id=manifest.created_at,
            details={"rows": manifest.rows, "files": len(manifest.files), "release": manifest.release},
        )
    )
    unit.finish()
    write_collected(unit.collected)
    return defects


def _number_events() -> None:
    """Assign sequence numbers to events that have none.

    The backup may contain such events. If the new database is SQLite, no sequencer would number them later.
    """
    last = execute("SELECT COALESCE(MAX(seq), 0) FROM kernel_events").fetchone()[0]
    waiting = execute("SELECT ins FROM kernel_events WHERE seq IS NULL ORDER BY ins").fetchall()
    for seq, (ins,) in enumerate(waiting, last + 1):
        execute("UPDATE kernel_events SET seq = ? WHERE ins = ?", (seq, ins))
