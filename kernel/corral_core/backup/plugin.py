"""The manifest and the hook implementations of the `backup` plugin."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from corral import clock
from corral.database.model import Model
from corral.plugin import Metric, Plugin, hookimpl
from corral_core.backup import hookspecs
from corral_core.backup.models import LastBackupRow

if TYPE_CHECKING:
    import click


class BackupPlugin(Plugin):
    """Backup: writes all data of an installation to one file, and restores it into SQLite or PostgreSQL."""

    name = "backup"
    protected = True

    @hookimpl
    def corral_models(self) -> Iterable[type[Model]]:
        return [LastBackupRow]

    @hookimpl
    def corral_hookspecs(self) -> Iterable[Any]:
        return [hookspecs]

    @hookimpl
    def corral_commands(self) -> Iterable[click.Command]:
        from corral_core.backup.command import backup_command, restore_command

        return [backup_command, restore_command]

    @hookimpl
    def corral_metrics(self) -> Iterable[Metric]:
        return [
            Metric(
                name="corral_last_backup_age_seconds",
                help="Age of the last backup, in seconds. Absent if there is no backup.",
                collect=_last_backup_age,
            )
        ]


def _last_backup_age() -> Mapping[tuple[str, ...], float]:
    row = LastBackupRow.get_or_none()
    return {} if row is None else {(): clock.elapsed_ms(row.finished_at, clock.now()) / 1000}
