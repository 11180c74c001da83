"""The commands `corral backup` and `corral restore`, which run on the server's machine."""

from __future__ import annotations

import asyncio
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import click

from corral.cli.output import config_option, json_option, print_value

ERASE_LINE = "\r\x1b[K"

if TYPE_CHECKING:
    from corral.plugin import CommandSession, OpenSession
    from corral.plugins.record import PluginRecord
    from corral.storage.blobs import BlobStore
    from corral_core.backup.service.archive import ArchiveWriter, Manifest


verbose_option = click.option("--verbose", is_flag=True, help="print the number of rows in each table")


class TableProgress:
    """Prints the steps of a backup or restore to standard error.

    On a terminal, each step overwrites the line of the previous step; in verbose mode, each step has its own line.
    Without a terminal, steps are printed only in verbose mode.
    """

    def __init__(self, *, verbose: bool) -> None:
        self._verbose, self._one_line = verbose, sys.stderr.isatty() and not verbose

    def print(self, text: str) -> None:
        """Print one step."""
        if self._one_line:
            click.echo(f"{ERASE_LINE}{text}", nl=False, err=True)
        elif self._verbose:
            _print_line(text)

    def end(self) -> None:
        """Erase the line that shows the current step."""
        if self._one_line:
            click.echo(ERASE_LINE, nl=False, err=True)


@click.command("backup")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--with-files/--no-files",
    default=None,
    help="include stored files in the backup (default: only if the files are stored in a local folder)",
)
@verbose_option
@config_option
@json_option
@click.pass_obj
def backup_command(
    open_session: OpenSession,
    file: Path,
    with_files: bool | None,
    verbose: bool,
    config_path: Path | None,
    as_json: bool,
) -> None:
    """Write all data of this installation to FILE. The server can keep running.

    FILE must not exist. The backup contains secrets only in encrypted form, and no keys: back up the master key
    separately, in another place. Only the user that runs this command can read FILE.
    """
    from corral.config.reader import load as load_config

    if file.exists():
        raise click.UsageError(f"{file} already exists; choose another name, or move the existing file away")
    if not file.parent.is_dir():
        raise click.UsageError(f"{file.parent} is not a folder; create it first")
    url = load_config(path=config_path).storage.url
    with_files = (url is None or url.startswith("file://")) if with_files is None else with_files
    with open_session(config_path, "backup") as session:
        progress = TableProgress(verbose=verbose)
        manifest = _write(session, file, progress, with_files=with_files, config_path=config_path)
        _record_backup(session, manifest, with_files=with_files)
    found = {
        "file": str(file),
        "bytes": file.stat().st_size,
        "created_at": manifest.created_at,
        "tables": len(manifest.tables),
        "rows": manifest.rows,
        "table_rows": _rows_of_tables(manifest),
        "files": len(manifest.files) if with_files else None,
    }
    files = f"{len(manifest.files)} files" if with_files else "no files"
    text = f"Wrote {manifest.rows} rows from {len(manifest.tables)} tables and {files} to {file}. It contains no keys."
    print_value(found, as_json=as_json, text=text)


def _rows_of_tables(manifest: Manifest) -> dict[str, int]:
    return {table: entry.rows for table, entry in manifest.tables.items() if entry.rows}


def _write(
    session: CommandSession, file: Path, progress: TableProgress, *, with_files: bool, config_path: Path | None
) -> Manifest:
    from corral import clock
    from corral.cli.database_snapshot import models_of, open_snapshot
    from corral.database.engine import Database
    from corral.storage.blobs import BlobStore
    from corral_core.backup.service.archive import FORMAT, ArchiveWriter, Manifest

    database = session.service(Database)
    with ArchiveWriter(file) as writer:
        created_at = clock.now()
        with open_snapshot(database) as snapshot:
            schemas = snapshot.schemas()
            for table in snapshot.tables(models_of(_plugins_in_snapshot(schemas, config_path))):
                columns, rows = snapshot.read(table)
                writer.write_table(table, columns, rows)
                if count := writer.tables[table].rows:
                    progress.print(f"{table}: {count} rows")
        if with_files:  # after the snapshot: a file is stored before the row that refers to it
            asyncio.run(_write_files(writer, session.service(BlobStore)))
            progress.print(f"{len(writer.files)} files")
        progress.end()
        manifest = Manifest(
            format=FORMAT,
            release=version("corral"),
            created_at=created_at,
            engine=database.kind,
            schemas=schemas,
            tables=writer.tables,
            files=writer.files,
        )
        writer.finish(manifest)
    return manifest


def _plugins_in_snapshot(schemas: dict[str, list[str]], config_path: Path | None) -> list[PluginRecord]:
    """Return the installed plugins, including disabled ones, and warn about plugins whose data the backup omits.

    The data of plugins that are not installed is omitted: these plugins are removed from `schemas`.
    """
    from corral.config.reader import load as load_config
    from corral.plugins.discovery import discover
    from corral.plugins.loading import load
    from corral.plugins.migrations import migrations_of
    from corral_core.backup.service.restore import with_all_plugins

    config = with_all_plugins(load_config(path=config_path))
    records = load(discover(config), config)
    for name in {*schemas} - {each.plugin for each in migrations_of(records)}:
        del schemas[name]
        _print_line(f"warning: the data of the plugin {name} is not in the backup, because the plugin is not installed")
    return records


async def _write_files(writer: ArchiveWriter, store: BlobStore) -> None:
    from corral.storage.blobs import BlobMissing

    async for blob in store.scan():
        try:
            chunks = await store.read(blob.key)
        except BlobMissing:  # deleted since the scan
            continue
        await writer.write_file(blob.key, chunks)


def _record_backup(session: CommandSession, manifest: Manifest, *, with_files: bool) -> None:
    """Store the time of the backup, and record in the audit log that all data was exported.

    The metric `corral_last_backup_age_seconds` is computed from the stored time.
    """
    from corral import clock
    from corral.plugin import Audit, AuditEntry
    from corral_core.backup.models import ROW, LastBackupRow

    audit: Audit = session.service(Audit)
    details = {"rows": manifest.rows, "files": len(manifest.files) if with_files else None}

    def record() -> None:
        row = {"finished_at": clock.now()}
        insert = LastBackupRow.insert(id=ROW, **row)
        insert.on_conflict(conflict_target=[LastBackupRow.id], update=row).execute()
        audit.record(
            AuditEntry(action="backup.created", object_type="backup", object_id=manifest.created_at, details=details)
        )

    session.run(record)


@click.command("restore")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@verbose_option
@config_option
@json_option
def restore_command(file: Path, verbose: bool, config_path: Path | None, as_json: bool) -> None:
    """Restore a backup into the configured database and data folder, which must be empty.

    All checksums in FILE are verified first. A failed restore leaves the database empty. All sessions are ended and the
    kill switch is engaged, so that a copy started beside the original runs nothing and sends nothing until `corral
    kill-switch off` is run. Put the master key in place before or after the restore. The exit status is 1 if the
    restored audit log is not intact.
    """
    from corral.auth.principal import Principal
    from corral.cli import logging_setup
    from corral.cli.command_kernels import operator_name
    from corral.cli.data_folder import ensure_data_dir, restrict_new_files
    from corral.config.reader import load as load_config
    from corral.database.unit import Actor, UnitContext
    from corral_core.backup.service.archive import Archive, ArchiveError
    from corral_core.backup.service.restore import restore

    config, name = load_config(path=config_path), operator_name()
    logging_setup.configure("critical", "console")
    restrict_new_files()
    try:
        with Archive(file) as archive:
            archive.verify()
            progress = TableProgress(verbose=verbose)
            progress.print("all checksums are correct")
            ensure_data_dir(config)
            entry = UnitContext(label="command restore", actor=Actor("system", name))
            by = Principal(kind="system", id=name, role="admin")
            defects, manifest = restore(archive, config, entry, by, progress.print), archive.manifest
            progress.end()
    except ArchiveError as error:
        raise click.ClickException(str(error)) from None
    found = {
        "created_at": manifest.created_at,
        "rows": manifest.rows,
        "table_rows": _rows_of_tables(manifest),
        "files": len(manifest.files),
        "defects": defects,
    }
    lines = [
        f"Restored {manifest.rows} rows and {len(manifest.files)} files from the backup of {manifest.created_at}.",
        *defects,
        "The kill switch is engaged. Put the master key in place, and run `corral kill-switch off` to start the work.",
    ]
    print_value(found, as_json=as_json, text="\n".join(lines))
    sys.exit(1 if defects else 0)


def _print_line(line: str) -> None:
    click.echo(line, err=True)
