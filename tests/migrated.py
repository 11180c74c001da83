"""Databases for servers under test, migrated before they start: migrating takes most of the time of a first start."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from corral.cli.data_folder import restrict_new_files
from corral.config.model import Config
from corral.config.reader import load
from corral.errors import StartupError
from corral.testing import database_templates
from corral.testing.booting import discover

_databases: set[str] = set()
_servers: set[str] = set()


def migrate_by_copy(environ: Mapping[str, str], folder: Path) -> None:
    """Give the server that starts with this environment, in this folder, a copy of a migrated database.

    It gets none if it has a database, if its configuration is faulty, or if the environment names no data folder. The
    copy has the tables of the built-in plugins. Others are added when the server starts, but on PostgreSQL only if an
    administrator asks for it.
    """
    config = _read_config(environ, folder)
    if config is None:
        return
    url = config.database.url
    if url.startswith("postgresql:"):
        if not config.plugins.enabled and _is_shared(url):
            _copy(url)
    elif not Path(url.removeprefix("sqlite:///")).exists():
        before = restrict_new_files()
        try:
            config.data_dir.mkdir(parents=True, exist_ok=True)
            _copy(url)
        finally:
            os.umask(before)


def _read_config(environ: Mapping[str, str], folder: Path) -> Config | None:
    """Return the configuration as the server reads it that starts in this folder."""
    if "CORRAL_DATA_DIR" not in environ:
        return None
    names = {"CORRAL_CONFIG": "corral.toml", **environ}
    paths = {name: str(folder / names[name]) for name in ("CORRAL_CONFIG", "CORRAL_DATA_DIR")}
    with contextlib.suppress(StartupError):
        return load({**environ, **paths})
    return None


def _copy(url: str) -> None:
    config = Config()
    database_templates.create_from_template(url, discover(config), config)


def _is_shared(url: str) -> bool:
    """Return whether this database is new, on a database server that had another before: a template pays off there."""
    server = url.replace(urlsplit(url).path, "/", 1)
    is_new, is_shared = url not in _databases, server in _servers
    _databases.add(url)
    _servers.add(server)
    return is_new and is_shared
