"""Boots kernels for tests with a copy of a migrated database and with the plugins that a test requests."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from corral.asgi.application import Application
from corral.cli.data_folder import ensure_data_dir
from corral.config.model import Config
from corral.config.reader import load as load_config
from corral.kernel import Kernel, boot
from corral.plugin import Plugin
from corral.plugins.discovery import Found
from corral.plugins.discovery import discover as look_for
from corral.plugins.loading import load
from corral.plugins.record import PluginRecord, block_dependants
from corral.testing import database_templates
from corral_core.health.service import scrape


class KernelOptions(NamedTuple):
    """The options of a test kernel. See `corral.testing.kit.make_kernel`."""

    plugins: Sequence[type[Plugin] | str] | None
    database_url: str | None
    config: Mapping[str, Any]
    environ: Mapping[str, str]


def boot_kernel(folder: Path, options: KernelOptions) -> tuple[Kernel, Application]:
    """Boot a kernel in this folder. Return the kernel and its ASGI application.

    If the database does not exist or is an empty PostgreSQL database, it is created with the tables of the built-in
    plugins.
    """
    config = _load_config(folder, options)
    ensure_data_dir(config)
    scrape.COLLECT_SECONDS = PATIENT_SECONDS
    found = _selected(discover(config), options.plugins)
    is_new = bool(config.database.migrate_on_start) and database_templates.create_from_template(
        config.database.url, found, config
    )
    records = load(found, config)
    with _without_migrations() if is_new and not _has_migrations(records) else contextlib.nullcontext():
        kernel = boot(config, plugins=records)
    try:
        return kernel, Application(kernel)
    except BaseException:
        kernel.database.close()
        raise


def _has_migrations(records: Sequence[PluginRecord]) -> bool:
    """Return whether any plugin other than the built-in plugins may have migrations."""
    return any(record.kind is None or record.migrations() for record in records if not record.found.built_in)


def _without_migrations() -> contextlib.AbstractContextManager[Any]:
    """Return a context in which kernels boot without checking for pending migrations.

    The check takes a sixth of the boot time.
    """
    return mock.patch("corral.kernel.apply_migrations", lambda database, plugins, config: block_dependants(plugins))


def discover(config: Config) -> list[Found]:
    """Return the installed plugins.

    Discovery is slow, so the result is cached until a folder on the import path changes.
    """
    if config.plugins.dir is not None:
        return look_for(config)
    return list(_discover_cached(tuple((path, _modification_time(path)) for path in sys.path)))


@functools.lru_cache(maxsize=8)
def _discover_cached(import_path: tuple[tuple[str, int], ...]) -> list[Found]:
    return look_for(Config())


def _modification_time(path: str) -> int:
    try:
        return os.stat(path or ".").st_mtime_ns
    except OSError:
        return 0


CORE_PACKAGE = "corral_core"


def is_core(kind: type[Plugin]) -> bool:
    """Return whether the plugin is a core plugin. Every kernel that the test kit creates contains the core plugins."""
    return kind.__module__.partition(".")[0] == CORE_PACKAGE


PATIENT_SECONDS = 5.0  # tests that read a scrape need all metrics, even on a busy machine


def _load_config(folder: Path, options: KernelOptions) -> Config:
    overrides: dict[str, Any] = {
        "data_dir": str(folder / "data"),
        "rate_limits": False,
        "database.migrate_on_start": True,
        "database.pool_size": 4,
        "database.url": options.database_url,
        **options.config,
    }
    if options.plugins is not None:
        overrides["plugins.enabled"] = [item if isinstance(item, str) else item.name for item in options.plugins]
    return load_config(options.environ, path=Path(os.devnull), overrides=overrides)


def _selected(found: list[Found], plugins: Sequence[type[Plugin] | str] | None) -> list[Found]:
    """Return the core plugins and the given plugins, or all installed plugins if `plugins` is None."""
    if plugins is None:
        return found
    classes = [item for item in plugins if not isinstance(item, str)]
    for item in classes:
        if item.__module__ == "__main__":
            raise ValueError(
                f"the plugin class {item.__name__} is defined in the script that is being run; move it to a module of "
                "its own, and import it from there"
            )
    selected = [item for item in found if item.name in plugins or item.package == CORE_PACKAGE]
    return selected + [
        Found(name=item.name, load=lambda item=item: item, module=item.__module__, distribution="test")  # type: ignore[misc]  # bound now
        for item in classes
    ]
