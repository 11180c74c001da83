"""The `corral migrate` command, which applies plugins' pending migrations in dependency order."""

from __future__ import annotations

from pathlib import Path

import click

from corral.cli import logging_setup, output
from corral.cli.data_folder import ensure_data_dir, restrict_new_files
from corral.cli.doctor import is_database_missing
from corral.cli.output import config_option, json_option
from corral.config.reader import load as load_config


@click.command("migrate")
@click.argument("plugin", required=False)
@click.option("--plan", is_flag=True, help="list the pending migrations without applying them")
@config_option
@json_option
def migrate_command(plugin: str | None, plan: bool, as_json: bool, config_path: Path | None) -> None:
    """Apply the pending migrations of PLUGIN, or of all plugins.

    The command may run while servers are running. If several processes migrate at the same time, each migration is
    applied once.
    """
    from corral.database.connect import connect
    from corral.database.migrations import migrate, pending_migrations, schema_lock
    from corral.plugins.discovery import discover
    from corral.plugins.loading import load
    from corral.plugins.migrations import migrations_of

    config = load_config(path=config_path)
    logging_setup.configure("warning", "console")
    url = config.database.url
    if not plan:
        restrict_new_files()
        ensure_data_dir(config)
    elif is_database_missing(config):
        url = "sqlite:///:memory:"  # everything is pending, and no file is created
    database = connect(url)
    try:
        loaded = [item for item in load(discover(config), config) if item.active]
        if plugin is not None and plugin not in {item.name for item in loaded}:
            raise click.UsageError(f"no plugin named {plugin} is active; `corral plugins list` shows all plugins")
        migrations = [each for each in migrations_of(loaded) if plugin in (None, each.plugin)]
        if plan:
            scripts = pending_migrations(database, migrations)
        else:
            with schema_lock(database) as engine:
                pending_migrations(database, migrations)  # raises for a newer schema before any migration is applied
                scripts = {each.plugin: migrate(engine, each) for each in migrations}
        rows = [{"plugin": name, "migration": script} for name, of in scripts.items() for script in of]
        done = "pending" if plan else "applied"
        output.print_table(rows, ("plugin", "migration"), as_json=as_json, empty="No migration is pending.", title=done)
    finally:
        database.close()
