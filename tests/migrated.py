"""Databases for servers under test, migrated before they start: migrating takes most of the time of a first start."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from corral.cli.data_folder import restrict_new_files
from corral.config.model import Config
from corral.testing import database_templates
from corral.testing.booting import discover

_databases: set[str] = set()
_servers: set[str] = set()


def migrate_by_copy(environ: Mapping[str, str]) -> None:
    """Give the server that starts with this environment a copy of a migrated database, if it has none yet.

    A server with a configuration file of its own migrates its database itself.
    """
    folder, url = environ.get("CORRAL_DATA_DIR"), environ.get("CORRAL_DATABASE_URL")
    if folder is None or environ.get("CORRAL_CONFIG") != os.devnull:
        return
    if url is None and not Path(folder, "corral.db").exists():
        before = restrict_new_files()
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            _copy(f"sqlite:///{folder}/corral.db")
        finally:
            os.umask(before)
    elif url is not None and url.startswith("postgresql:") and _is_shared(url):
        _copy(url)


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
