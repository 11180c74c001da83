"""Creates databases for tests as copies of migrated templates, because copying is much faster than migrating.

`make_kernel` uses templates for the built-in plugins. The migrations of other plugins are applied to the copy. A new
template is created from the existing template that already contains the largest number of the required migrations and
no others.
"""

from __future__ import annotations

import atexit
import hashlib
import secrets
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from corral.config.model import Config
from corral.database.connect import connect
from corral.database.migrations import existing_tables, own_connection
from corral.plugins.discovery import Found
from corral.plugins.loading import load
from corral.plugins.migrations import apply_migrations, migrations_of
from corral.plugins.record import PluginRecord
from corral.testing.database_servers import execute

Scripts = frozenset[str]
"""The migration scripts of a set of plugins: for each plugin, a string with its name and a hash of its scripts."""

_made: dict[tuple[str, Scripts], str] = {}
_folders: list[Path] = []
_loaded: dict[tuple[tuple[str, ...], str], tuple[list[PluginRecord], Scripts]] = {}


def create_from_template(url: str, found: Sequence[Found], config: Config) -> bool:
    """Create the database at `url` as a copy of a template.

    Nothing is created if the database already exists, unless it is an empty PostgreSQL database.

    The template contains the migrations of the built-in plugins in `found`. Return whether the database was created.
    """
    own = [item for item in found if item.built_in]
    if url.startswith("sqlite:///"):
        path = Path(url.removeprefix("sqlite:///"))
        if path.exists():
            return False
        shutil.copyfile(_sqlite_template(*_load_plugins(own, config), config), path)
        return True
    return _copy_postgres(url, *_load_plugins(own, config), config)


def _load_plugins(own: Sequence[Found], config: Config) -> tuple[list[PluginRecord], Scripts]:
    """Load a set of plugins. Return their records, which may be used only for migrations, and their migration scripts.

    The result is cached in the process unless a plugin fails to load, because a test may break a plugin that the next
    test loads successfully.
    """
    key = (tuple(item.name for item in own), repr(msgspec.structs.asdict(config.plugins)))
    if key in _loaded:
        return _loaded[key]
    plugins = load(own, config)
    loaded = plugins, _scripts(plugins)
    if all(record.state != "failed" for record in plugins):
        _loaded[key] = loaded
    return loaded


def _sqlite_template(plugins: list[PluginRecord], scripts: Scripts, config: Config) -> str:
    key = ("sqlite", scripts)
    if key not in _made:
        if not _folders:
            _folders.append(Path(tempfile.mkdtemp(prefix="corral-templates-")))
            atexit.register(shutil.rmtree, _folders[0], ignore_errors=True)
        path = _folders[0] / f"{secrets.token_hex(6)}.db"
        if base := _nearest_template(*key):
            shutil.copyfile(base, path)
        _migrate(f"sqlite:///{path}", plugins, config)
        _made[key] = str(path)
    return _made[key]


def _copy_postgres(url: str, plugins: list[PluginRecord], scripts: Scripts, config: Config) -> bool:
    """Create a PostgreSQL database from a template, and return whether the database was created.

    An empty database with the same name is replaced.
    """
    from psycopg.errors import DuplicateDatabase

    server = url.replace(_database_name(url), "postgres", 1)
    key = (server, scripts)
    if key not in _made:
        name = f"corral_template_{secrets.token_hex(6)}"
        execute(server, _create_database_sql(name, _nearest_template(*key)))
        _migrate(url.replace(_database_name(url), name, 1), plugins, config)
        _made[key] = name
    copy = _create_database_sql(_database_name(url), _made[key])
    try:
        execute(server, copy)
    except DuplicateDatabase:
        if not is_empty(url):
            return False
        execute(server, f'DROP DATABASE "{_database_name(url)}" WITH (FORCE)')
        execute(server, copy)
    return True


def _create_database_sql(name: str, template: str | None) -> str:
    copied = f' TEMPLATE "{template}" STRATEGY FILE_COPY' if template else ""
    return f'CREATE DATABASE "{name}"{copied}'


def _nearest_template(place: str, scripts: Scripts) -> str | None:
    """Return the template in `place` with the largest number of these scripts and no other scripts, or None."""
    parts = [made for where, made in _made if where == place and made < scripts]
    return _made[place, max(parts, key=len)] if parts else None


def _migrate(url: str, plugins: list[PluginRecord], config: Config) -> None:
    section = msgspec.structs.replace(config.database, migrate_on_start=True)
    config, database = msgspec.structs.replace(config, database=section), connect(url, pool_size=1)
    try:
        apply_migrations(database, plugins, config)
    finally:
        database.close()


def _scripts(plugins: Sequence[PluginRecord]) -> Scripts:
    found = set()
    for migrations in migrations_of(plugins):
        digest = hashlib.sha256()
        for path in sorted(migrations.directory.glob("*.py")):
            digest.update(f"{path.name}\0".encode() + path.read_bytes())
        found.add(f"{migrations.plugin} {digest.hexdigest()}")
    return frozenset(found)


def is_empty(url: str) -> bool:
    """Return whether the database has no tables."""
    database = connect(url, pool_size=1)
    try:
        with own_connection(database) as engine:
            return not existing_tables(engine)
    finally:
        database.close()


def _database_name(url: str) -> str:
    return urlsplit(url).path.lstrip("/")
