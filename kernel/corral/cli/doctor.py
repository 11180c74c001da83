"""The `corral doctor` command, which checks an installation and suggests a remedy for each problem.

The checks change nothing and leave no files behind.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import ctypes
import hashlib
import os
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

import click

from corral import clock
from corral.cli import logging_setup, output
from corral.cli.damaged_database import REMEDY, find_damage, sqlite_path
from corral.cli.output import config_option, json_option
from corral.config.model import Config
from corral.config.reader import load as load_config
from corral.config.reader import readable_by_others
from corral.crypto import KEY_FILE, Keyring
from corral.errors import StartupError
from corral.plugins.discovery import discover

if TYPE_CHECKING:
    from corral.crypto import Keyring
    from corral.database.engine import Database


@click.command("doctor")
@config_option
@json_option
def doctor_command(config_path: Path | None, as_json: bool) -> None:
    """Check the installation and print one line per check, with a remedy for each problem.

    The checks cover the configuration, data folder, keys, disk, database, Redis, storage, mail, clock and plugins. The
    command changes nothing. The exit status is 1 if any check has the status `down`.
    """
    logging_setup.configure("critical", "console")
    try:
        config = load_config(path=config_path)
    except StartupError as refused:
        remedy = "correct the configuration; `corral config init PATH` writes a sample file with every key"
        findings = [Finding("configuration", "down", fault, remedy) for fault in refused.faults]
    else:
        findings = list(check_installation(config))
    if as_json:
        output.print_table([finding.row() for finding in findings], (), as_json=True)
    else:
        for finding in findings:
            _print_finding(finding)
    if any(finding.status == "down" for finding in findings):
        sys.exit(1)


def _print_finding(finding: Finding) -> None:
    status = click.style(f"{finding.status:<8}", fg=output.COLOURS[finding.status])
    remedy = f"; {finding.remedy}" if finding.remedy else ""
    click.echo(f"{status} {finding.check:<14} {finding.detail}{remedy}")


LOW_BYTES, FULL_BYTES = 1 << 30, 100 << 20
SKEW_WARNING, SKEW_DOWN = 2.0, 30.0
UNSYNCHRONISED = 5  # adjtimex(2): TIME_ERROR


class Finding(NamedTuple):
    """The result of one check: its name, its status, the details, and the remedy for a problem."""

    check: str
    status: str  # ok | warning | down
    detail: str
    remedy: str = ""

    def row(self) -> dict[str, Any]:
        """Return the finding as a row of the JSON output."""
        return {"check": self.check, "status": self.status, "detail": self.detail, "remedy": self.remedy or None}


def check_installation(config: Config) -> Iterator[Finding]:
    """Run all checks and yield their findings. An error in a check becomes a finding and does not stop other checks."""
    checks: tuple[Callable[[Config], Iterator[Finding]], ...] = (
        check_configuration,
        check_data_folder,
        check_keys,
        check_disk,
        check_database,
        check_redis,
        check_storage,
        check_mail,
        check_clock,
        check_plugins,
        check_modified_files,
    )
    for check in checks:
        try:
            yield from check(config)
        except Exception as error:
            name, remedy = check.__name__.removeprefix("check_").replace("_", " "), "report this as a bug in Corral"
            detail = f"{type(error).__name__}: {error}"
            if isinstance(error, OSError) and error.filename is not None:
                detail, remedy = (
                    f"{error.filename}: {error.strerror}",
                    "run `corral doctor` as the user that the server runs as",
                )
            yield Finding(name, "down", f"the check failed: {detail}", remedy)


def check_configuration(config: Config) -> Iterator[Finding]:
    yield Finding("configuration", "ok", str(config.path or "no file; only defaults and environment variables"))
    for warning in config.warnings:
        yield Finding(
            "configuration", "warning", warning, "correct the value, or ignore this warning if the value is intended"
        )
    if config.path is not None and config.path.is_file() and readable_by_others(config.path):
        text = config.path.read_text("utf-8", "replace")
        if any(name in text for name in ("master_key =", "jwt_secret =", "password =")):
            yield Finding(
                "configuration", "warning", f"other users can read {config.path}", f"run chmod 600 {config.path}"
            )


def check_data_folder(config: Config) -> Iterator[Finding]:
    folder = config.data_dir
    if not folder.exists():
        yield Finding("data folder", "warning", f"{folder} does not exist", "start corral serve, which creates it")
        return
    mode = stat.S_IMODE(folder.stat().st_mode)
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        yield Finding(
            "data folder",
            "down",
            f"{folder} must be readable and writable",
            "change the owner of the folder to the user that the server runs as",
        )
    elif mode & (stat.S_IRWXG | stat.S_IRWXO):
        yield Finding(
            "data folder", "warning", f"other users can access {folder} (mode {mode:04o})", f"run chmod 700 {folder}"
        )
    else:
        yield Finding("data folder", "ok", str(folder))


def check_keys(config: Config) -> Iterator[Finding]:
    path = config.data_dir / KEY_FILE
    if path.exists():
        path.open("rb").close()  # raises if the file cannot be read, which differs from a wrong key
    exposed = [each for each in sorted(config.data_dir.glob("*.key")) if readable_by_others(each)]
    for each in exposed:
        yield Finding(
            "keys",
            "down",
            f"other users can read {each}",
            f"run chmod 600 {each}, and rotate the key if anyone read it",
        )
    try:
        keyring = Keyring.load(config)
    except StartupError as refused:
        if not exposed:
            remedy = "restore the right key from its backup; a new key cannot decrypt the stored values"
            yield from (Finding("keys", "down", fault, remedy) for fault in refused.faults)
        return
    if is_vault_sealed(config, keyring):
        remedy = "restore the right key from its backup; no stored value is lost or changed until then"
        yield Finding("keys", "down", "the vault is sealed: no available master key decrypts the stored values", remedy)
    elif not keyring.keys:
        yield Finding("keys", "warning", "there is no master key yet", "start corral serve, which creates one")
    elif config.keys.master_key is None:
        remedy = "back up the key in another place, or set CORRAL_MASTER_KEY"
        yield Finding("keys", "warning", f"{path} is in the same folder as the data that it protects", remedy)
    else:
        yield Finding(
            "keys", "ok", f"{keyring.keys[0].label} is the active key of {len(keyring.keys)} from {keyring.source}"
        )


def check_disk(config: Config) -> Iterator[Finding]:
    folder = next(each for each in (config.data_dir, *config.data_dir.parents) if each.exists())
    free = shutil.disk_usage(folder).free
    detail = f"{free / (1 << 30):.1f} GiB free at {folder}"
    if free < FULL_BYTES:
        yield Finding("disk", "down", detail, "free disk space, because writes fail below 100 MiB")
    elif free < LOW_BYTES:
        yield Finding("disk", "warning", detail, "free disk space, or move the data folder to a larger disk")
    else:
        yield Finding("disk", "ok", detail)


def check_redis(config: Config) -> Iterator[Finding]:
    if config.redis.url is None:
        yield Finding("redis", "ok", "not configured")
        return
    error = ping_redis(config.redis.url)
    if error is not None:
        yield Finding(
            "redis", "down", error, "start Redis or correct [redis] url; until then, processes poll the database"
        )
    elif not has_redis_plugin(config):
        yield Finding(
            "redis",
            "down",
            "Redis answers, but no active plugin supports it",
            "install such a plugin, or remove [redis] url",
        )
    else:
        yield Finding("redis", "ok", "Redis answers")


def check_storage(config: Config) -> Iterator[Finding]:
    folder = config.files_dir
    if folder is None:
        error = ping_storage(config)
        remedy = "correct [storage] url, its credentials or the network"
        yield Finding("storage", "down", error, remedy) if error else Finding("storage", "ok", "the store answers")
    elif folder.exists() and not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        yield Finding(
            "storage",
            "down",
            f"{folder} must be readable and writable",
            "change the owner of the folder to the user that the server runs as",
        )
    elif config.storage.url is None and not config.database.is_file:
        detail = f"files are stored in {folder}, which other machines with the same database do not see"
        remedy = "set CORRAL_STORAGE_URL, for example to file:///FOLDER on a file system that all machines share"
        yield Finding("storage", "warning", detail, remedy)
    else:
        yield Finding("storage", "ok", f"not configured; files are stored in {folder}")


def check_mail(config: Config) -> Iterator[Finding]:
    """Check the mail server that the configuration file or the environment specifies.

    To test the mail settings that admins stored, use `POST /settings/test-mail`.
    """
    from corral.cli.command_kernels import temporary_kernel
    from corral.plugin import MailProbe

    host = config.pinned.get("mail.host")
    if host is None or not host.value:
        where = "not configured in the file or the environment"
        yield Finding("mail", "ok", f"{where}; `corral settings show mail.host` shows whether admins set it")
        return
    try:
        with temporary_kernel(config) as kernel:
            service = kernel.container.get_optional(MailProbe)
            failure = asyncio.run(service.probe()) if service is not None else "the plugin that sends mail is inactive"
    except StartupError:  # another check reports plugins that cannot be loaded
        return
    if failure is not None:
        remedy = "correct the settings mail.* or fix the mail server; the mails are sent afterwards"
        yield Finding("mail", "warning", failure, remedy)
    else:
        yield Finding("mail", "ok", f"{host.value} answers")


def check_clock(config: Config) -> Iterator[Finding]:
    skew = database_clock_skew(config)
    if skew is not None and abs(skew) > SKEW_WARNING:
        detail = f"the clock is {abs(skew):.0f} s {'behind' if skew > 0 else 'ahead of'} the clock of the database"
        status = "down" if abs(skew) > SKEW_DOWN else "warning"
        yield Finding("clock", status, detail, "synchronise both clocks with chrony or systemd-timesyncd")
    elif not _is_clock_synchronised():
        detail = f"{clock.now()}; no service synchronises the clock"
        yield Finding(
            "clock", "warning", detail, "start chrony or systemd-timesyncd, on the host if this is a container"
        )
    else:
        yield Finding("clock", "ok", clock.now())


def _is_clock_synchronised() -> bool:
    """Return False if the operating system reports that its clock is not synchronised, otherwise True."""
    if not sys.platform.startswith("linux"):
        return True
    try:
        return int(ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(512))) != UNSYNCHRONISED  # zeros: only query
    except (OSError, AttributeError):
        return True


def check_plugins(config: Config) -> Iterator[Finding]:
    from corral.asgi.application import Application
    from corral.cli.command_kernels import temporary_kernel

    began = time.monotonic()
    try:
        with temporary_kernel(config) as kernel:
            Application(kernel)
            states = [(item.name, item.state, item.reason) for item in kernel.plugins]
    except StartupError as refused:
        yield from (
            Finding("plugins", "down", fault, "fix the plugin; the server does not start without it")
            for fault in refused.faults
        )
        return
    for name, state, reason in states:
        if state == "failed":
            remedy = f"fix or update the plugin, or run `corral plugins disable {name}`"
            yield Finding("plugins", "down", f"{name} is failed: {reason}", remedy)
        elif state == "blocked":
            yield Finding("plugins", "warning", f"{name} is blocked: {reason}", "fix the plugins that it requires")
    yield from _missing_plugins(config, {name for name, _, _ in states})
    active = sum(state == "active" for _, state, _ in states)
    yield Finding("plugins", "ok", f"{active} active, loaded in {time.monotonic() - began:.1f} s")


def _missing_plugins(config: Config, installed: set[str]) -> Iterator[Finding]:
    """Yield a finding for each plugin and plugin folder that the configuration names but that does not exist."""
    folder = config.plugins.dir
    if folder is not None and not folder.is_dir():
        remedy = f"install plugins with pip install --target {folder}, or correct [plugins] dir"
        yield Finding("plugins", "warning", f"the folder {folder} does not exist", remedy)
    for name in config.plugins.enabled:
        if name not in installed:
            remedy = f"install its distribution with pip, or run `corral plugins disable {name}`"
            yield Finding("plugins", "warning", f"{name} is enabled but not installed", remedy)


def check_modified_files(config: Config) -> Iterator[Finding]:
    for distribution, files in modified_files(config):
        shown = ", ".join(files[:3]) + (f" and {len(files) - 3} more" if len(files) > 3 else "")
        remedy = f"run pip install --force-reinstall {distribution}, unless you changed the files"
        yield Finding("modified", "warning", f"{distribution}: {shown} changed after the installation", remedy)


SECONDS = 3.0


def check_database(config: Config) -> Iterator[Finding]:
    """Check whether the database answers and which migrations are pending."""
    path = sqlite_path(config)
    if is_database_missing(config):
        yield Finding(
            "database", "warning", f"{path} does not exist", "run `corral serve` or `corral migrate`, which create it"
        )
        return
    try:
        with _connected(config) as found:
            found.ping()
            yield Finding("database", "ok", f"{found.kind} answers")
            yield from _migrations(config, found)
    except StartupError as refused:
        yield from (Finding("database", "down", fault) for fault in refused.faults)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        remedy = "start the database or correct [database] url"
        damage = find_damage(error)
        if path is not None:
            remedy = REMEDY if damage else f"check whether {path} can be read"
        detail = f"the database does not answer: {reason}" if damage is None else f"{path} is damaged: {damage}"
        yield Finding("database", "down", detail, remedy)


def _migrations(config: Config, found: Database) -> Iterator[Finding]:
    from corral.database.migrations import SchemaTooNew, existing_tables, own_connection, pending_migrations
    from corral.plugins.discovery import discover
    from corral.plugins.loading import load
    from corral.plugins.migrations import migrates_on_start, migrations_of

    try:
        waiting = pending_migrations(found, migrations_of(load(discover(config), config)))
    except SchemaTooNew as error:
        yield Finding(
            "migrations", "down", str(error), "install the release of Corral that created this database, or a newer one"
        )
        return
    if not waiting:
        yield Finding("migrations", "ok", "no migration is pending")
        return
    with own_connection(found) as engine:
        is_empty = not existing_tables(engine)
    names = "; ".join(f"{plugin}: {', '.join(scripts)}" for plugin, scripts in waiting.items())
    if is_empty:
        yield Finding(
            "migrations",
            "warning",
            "the database is empty",
            "run `corral serve` or `corral migrate`, which create the tables",
        )
    elif migrates_on_start(config, found.kind):
        yield Finding(
            "migrations",
            "warning",
            f"pending: {names}",
            "restart `corral serve` or run `corral migrate`, which apply them",
        )
    else:
        yield Finding("migrations", "down", f"pending: {names}", "back up the database, then run `corral migrate`")


def is_vault_sealed(config: Config, keyring: Keyring) -> bool:
    """Return whether the database contains encrypted rows but `keyring` has no key that can decrypt any of them."""
    from corral.plugins.discovery import discover
    from corral.plugins.loading import load
    from corral.plugins.migrations import sealed_columns

    if is_database_missing(config):
        return False
    known = {key.id for key in keyring.keys}
    try:
        columns = sealed_columns(load(discover(config), config))
        with _connected(config) as found:
            stored = found.run(lambda: columns.key_ids(known), read=True)
    except Exception:  # another check reports an unusable database or schema
        return False
    return bool(stored) and stored.isdisjoint(known)


def database_clock_skew(config: Config) -> float | None:
    """Return the number of seconds by which the database's clock is ahead of this machine's clock, or None if unknown.

    SQLite has no clock of its own. For SQLite, the result is the number of seconds by which the newest event lies in
    the future, or 0.
    """
    from corral.database.migrations import own_connection

    if is_database_missing(config):
        return None
    engine: Any
    try:
        with _connected(config) as found, own_connection(found) as engine:
            if found.kind == "postgresql":
                began = time.time()
                theirs = float(engine.execute_sql("SELECT extract(epoch FROM clock_timestamp())").fetchone()[0])
                return theirs - (began + time.time()) / 2
            newest = engine.execute_sql("SELECT max(ts) FROM kernel_events").fetchone()[0]
            return max(0.0, clock.parse_instant(newest) - clock.time_s()) if newest else None
    except Exception:  # another check reports a database that does not answer
        return None


def ping_redis(url: str) -> str | None:
    """Ping Redis with the client library that the server uses. Return None if Redis answers, otherwise the error."""
    from redis import Redis

    try:
        with Redis.from_url(url, socket_timeout=SECONDS, socket_connect_timeout=SECONDS) as client:
            client.ping()
    except Exception as error:  # an unknown option in the URL is a TypeError
        return f"Redis cannot be used: {error}"
    return None


def has_redis_plugin(config: Config) -> bool:
    """Return whether an active plugin supports the Redis URL. Without such a plugin the server does not start."""
    from corral.plugins.discovery import discover
    from corral.plugins.hooks import first_result
    from corral.plugins.loading import load

    try:
        first_result(load(discover(config), config), "corral_bus", config.redis.url or "")
    except StartupError:
        return False
    return True


def ping_storage(config: Config) -> str | None:
    """Ping the storage.

    Return None if it answers, otherwise an error. A URL that no plugin supports is also an error.
    """
    import asyncio

    from corral.cli.file_stores import find_file_store

    url = config.storage.url or ""
    store = find_file_store(url, config)
    if store is None:
        return f"no active plugin supports {urlsplit(url).scheme}:// storage"
    return asyncio.run(_probe(store))


async def _probe(store: Any) -> str | None:
    import asyncio

    try:
        async with asyncio.timeout(SECONDS):
            await store.probe()
    except Exception as error:
        return f"the store does not answer: {type(error).__name__}: {error}"
    return None


@contextlib.contextmanager
def _connected(config: Config) -> Iterator[Database]:
    from corral.database.connect import connect

    found = connect(config.database.url, pool_size=1)
    try:
        yield found
    finally:
        found.close()


def is_database_missing(config: Config) -> bool:
    """Return whether the database is an SQLite file that does not exist.

    Raise `PermissionError` if the folder of the file cannot be accessed.
    """
    path = sqlite_path(config)
    return path is not None and not path.exists()


def modified_files(config: Config) -> Iterator[tuple[str, list[str]]]:
    """Yield `(distribution, files)` for each enabled third-party plugin whose files do not match its RECORD file."""
    wanted = {found.distribution for found in discover(config) if found.name in config.plugins.enabled}
    for distribution in metadata.distributions():
        name = str(distribution.metadata["Name"]).lower()
        if name in wanted:
            wanted.discard(name)  # only the first on the import path is used
            files = [str(path) for path in distribution.files or () if _is_modified(path)]
            if files:
                yield name, files


def _is_modified(path: metadata.PackagePath) -> bool:
    """Return whether a file is missing or changed. Files without a checksum in RECORD are never reported."""
    if path.hash is None or path.suffix == ".pyc":
        return False
    try:
        found = hashlib.new(path.hash.mode, Path(str(path.locate())).read_bytes()).digest()
    except (OSError, ValueError):
        return True
    return base64.urlsafe_b64encode(found).rstrip(b"=").decode() != path.hash.value
