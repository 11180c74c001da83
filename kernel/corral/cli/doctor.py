"""The command `corral doctor`: checks an installation and suggests a remedy for each problem.

The checks only read, and leave no files behind.
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
from corral.cli import logs, output
from corral.cli.output import config_option, json_option
from corral.config.model import Config
from corral.config.reader import load as load_config
from corral.config.reader import readable_by_others
from corral.crypto import KEY_FILE, Keyring
from corral.errors import Refused
from corral.plugins.discovery import discover

if TYPE_CHECKING:
    from corral.crypto import Keyring
    from corral.database.engine import Database


@click.command("doctor")
@config_option
@json_option
def command(config_path: Path | None, as_json: bool) -> None:
    """Check configuration, folder, keys, database, services, clock and plugins; one line each, with the remedy.

    Changes nothing. Exits with 1 if anything is down.
    """
    logs.configure("critical", "console")
    try:
        config = load_config(path=config_path)
    except Refused as refused:
        remedy = "correct it; corral config init PATH writes a file with every key to compare"
        findings = [Finding("configuration", "down", fault, remedy) for fault in refused.faults]
    else:
        findings = list(installation(config))
    if as_json:
        output.table([finding.row() for finding in findings], (), as_json=True)
    else:
        for finding in findings:
            _line(finding)
    if any(finding.status == "down" for finding in findings):
        sys.exit(1)


def _line(finding: Finding) -> None:
    status = click.style(f"{finding.status:<8}", fg=output.COLOURS[finding.status])
    remedy = f"; {finding.remedy}" if finding.remedy else ""
    click.echo(f"{status} {finding.check:<14} {finding.detail}{remedy}")


LOW_BYTES, FULL_BYTES = 1 << 30, 100 << 20
SKEW_WARNING, SKEW_DOWN = 2.0, 30.0
UNSYNCHRONISED = 5  # adjtimex(2): TIME_ERROR


class Finding(NamedTuple):
    """The result of one check: its name, status and details, and the remedy if there is a problem."""

    check: str
    status: str  # ok | warning | down
    detail: str
    remedy: str = ""

    def row(self) -> dict[str, Any]:
        """Return the finding as a row of the JSON output."""
        return {"check": self.check, "status": self.status, "detail": self.detail, "remedy": self.remedy or None}


def installation(config: Config) -> Iterator[Finding]:
    """Run all checks and yield their findings. If a check raises, the error is a finding and the other checks run."""
    checks: tuple[Callable[[Config], Iterator[Finding]], ...] = (
        _configuration,
        _folder,
        _keys,
        _disk,
        _database,
        _redis,
        _storage,
        mail,
        _clock,
        _plugins,
        _modified,
    )
    for check in checks:
        try:
            yield from check(config)
        except Exception as error:
            name, detail, remedy = check.__name__.strip("_"), f"{type(error).__name__}: {error}", "report this"
            if isinstance(error, OSError) and error.filename is not None:
                detail, remedy = f"{error.filename}: {error.strerror}", "run this as the account that serves"
            yield Finding(name, "down", f"could not be checked: {detail}", remedy)


def _configuration(config: Config) -> Iterator[Finding]:
    yield Finding("configuration", "ok", str(config.path or "no file; defaults and environment"))
    for warning in config.warnings:
        yield Finding("configuration", "warning", warning, "correct it, or leave it if it is meant")
    if config.path is not None and config.path.is_file() and readable_by_others(config.path):
        text = config.path.read_text("utf-8", "replace")
        if any(name in text for name in ("master_key =", "jwt_secret =", "password =")):
            yield Finding("configuration", "warning", f"others may read {config.path}", f"chmod 600 {config.path}")


def _folder(config: Config) -> Iterator[Finding]:
    folder = config.data_dir
    if not folder.exists():
        yield Finding("data folder", "warning", f"{folder} does not exist", "corral serve makes it")
        return
    mode = stat.S_IMODE(folder.stat().st_mode)
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        yield Finding(
            "data folder", "down", f"{folder} cannot be read and written", "give it to the account that serves"
        )
    elif mode & (stat.S_IRWXG | stat.S_IRWXO):
        yield Finding("data folder", "warning", f"{folder} has mode {mode:04o}", f"chmod 700 {folder}")
    else:
        yield Finding("data folder", "ok", str(folder))


def _keys(config: Config) -> Iterator[Finding]:
    path = config.data_dir / KEY_FILE
    if path.exists():
        path.open("rb").close()  # raises if the file cannot be read, which differs from a wrong key
    exposed = [each for each in sorted(config.data_dir.glob("*.key")) if readable_by_others(each)]
    for each in exposed:
        yield Finding("keys", "down", f"others may read {each}", f"chmod 600 {each}; if anybody did, rotate the key")
    try:
        keyring = Keyring.load(config)
    except Refused as refused:
        if not exposed:
            remedy = "restore the right key from its backup; a new one cannot read what the old one sealed"
            yield from (Finding("keys", "down", fault, remedy) for fault in refused.faults)
        return
    if is_sealed(config, keyring):
        remedy = "restore the right key from its backup; nothing is changed until then, and nothing is lost"
        yield Finding("keys", "down", "the vault is sealed: no key that is here opens the encrypted rows", remedy)
    elif not keyring.keys:
        yield Finding("keys", "warning", "there is no master key yet", "corral serve makes one at its first start")
    elif config.keys.master_key is None:
        remedy = "back the key up elsewhere, or give it as CORRAL_MASTER_KEY"
        yield Finding("keys", "warning", f"{path} lies in the folder of the data it protects", remedy)
    else:
        yield Finding("keys", "ok", f"{len(keyring.keys)} from {keyring.source}, {keyring.keys[0].label} is active")


def _disk(config: Config) -> Iterator[Finding]:
    folder = next(each for each in (config.data_dir, *config.data_dir.parents) if each.exists())
    free = shutil.disk_usage(folder).free
    detail = f"{free / (1 << 30):.1f} GiB free at {folder}"
    if free < FULL_BYTES:
        yield Finding("disk", "down", detail, "free space: below 100 MiB writes begin to fail")
    elif free < LOW_BYTES:
        yield Finding("disk", "warning", detail, "free space, or move the data folder")
    else:
        yield Finding("disk", "ok", detail)


def _database(config: Config) -> Iterator[Finding]:
    yield from database(config)


def _redis(config: Config) -> Iterator[Finding]:
    if config.redis.url is None:
        yield Finding("redis", "ok", "not configured")
        return
    error = ping_redis(config.redis.url)
    if error is not None:
        yield Finding("redis", "down", error, "start it, or correct [redis] url; until then the database announces")
    elif not has_bus(config):
        yield Finding("redis", "down", "answers, but no active plugin serves it", "install one, or remove [redis] url")
    else:
        yield Finding("redis", "ok", "answers")


def _storage(config: Config) -> Iterator[Finding]:
    folder = config.files_dir
    if folder is None:
        error = ping_store(config)
        remedy = "correct [storage] url, its keys or the network"
        yield Finding("storage", "down", error, remedy) if error else Finding("storage", "ok", "answers")
    elif folder.exists() and not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        yield Finding("storage", "down", f"{folder} cannot be written", "give it to the account that serves")
    else:
        yield Finding("storage", "ok", f"not configured; files lie in {folder}")


def mail(config: Config) -> Iterator[Finding]:
    """Check the mail server that the configuration file or the environment sets.

    Mail settings that admins stored are tested by `POST /settings/test-mail`.
    """
    from corral.egress.client import Egress
    from corral.egress.smtp import MailFailed, MailServer, probe

    given = {name.partition(".")[2]: pin.value for name, pin in config.pinned.items() if name.startswith("mail.")}
    if not given.get("host"):
        yield Finding("mail", "ok", "not configured")
        return
    server = MailServer(
        str(given["host"]),
        int(given.get("port", 587)),
        given.get("security", "starttls"),
        given.get("username"),
        given.get("password"),
    )
    try:
        asyncio.run(probe(Egress(config), server))
    except MailFailed as failure:
        yield Finding("mail", "warning", str(failure), "mails wait; mend mail.* or the server")
    else:
        yield Finding("mail", "ok", f"{server.host}:{server.port} answers")


def _clock(config: Config) -> Iterator[Finding]:
    skew = database_skew(config)
    if skew is not None and abs(skew) > SKEW_WARNING:
        detail = f"{abs(skew):.0f} s {'behind' if skew > 0 else 'ahead of'} the database"
        status = "down" if abs(skew) > SKEW_DOWN else "warning"
        yield Finding("clock", status, detail, "synchronise both clocks (chrony, systemd-timesyncd)")
    elif not _synchronised():
        detail = f"{clock.now()}; no service keeps it right"
        yield Finding("clock", "warning", detail, "start chrony or systemd-timesyncd (on the host, for a container)")
    else:
        yield Finding("clock", "ok", clock.now())


def _synchronised() -> bool:
    """Return whether the operating system reports a synchronised clock, or True if it reports nothing."""
    if not sys.platform.startswith("linux"):
        return True
    try:
        return int(ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(512))) != UNSYNCHRONISED  # zeros: only query
    except (OSError, AttributeError):
        return True


def _plugins(config: Config) -> Iterator[Finding]:
    from corral.asgi.application import Application
    from corral.cli.sessions import scratch

    began = time.monotonic()
    try:
        with scratch(config) as kernel:
            Application(kernel)
            states = [(item.name, item.state, item.reason) for item in kernel.plugins]
    except Refused as refused:
        yield from (
            Finding("plugins", "down", fault, "the server does not start without it") for fault in refused.faults
        )
        return
    for name, state, reason in states:
        if state == "failed":
            remedy = f"repair or update it, or corral plugins disable {name}"
            yield Finding("plugins", "down", f"{name} is failed: {reason}", remedy)
        elif state == "blocked":
            yield Finding("plugins", "warning", f"{name} is blocked: {reason}", "it comes with what it requires")
    yield from _absent(config, {name for name, _, _ in states})
    active = sum(state == "active" for _, state, _ in states)
    yield Finding("plugins", "ok", f"{active} active, loaded in {time.monotonic() - began:.1f} s")


def _absent(config: Config, installed: set[str]) -> Iterator[Finding]:
    """Yield findings for plugins and folders that the configuration names but that do not exist."""
    folder = config.plugins.dir
    if folder is not None and not folder.is_dir():
        remedy = f"pip install --target {folder} …, or correct [plugins] dir"
        yield Finding("plugins", "warning", f"the folder {folder} does not exist", remedy)
    for name in config.plugins.enabled:
        if name not in installed:
            remedy = f"pip install its distribution, or corral plugins disable {name}"
            yield Finding("plugins", "warning", f"{name} is enabled and not installed", remedy)


def _modified(config: Config) -> Iterator[Finding]:
    for distribution, files in modified_files(config):
        shown = ", ".join(files[:3]) + (f" and {len(files) - 3} more" if len(files) > 3 else "")
        remedy = f"pip install --force-reinstall {distribution}, unless you changed it"
        yield Finding("modified", "warning", f"{distribution}: {shown} differs from what was installed", remedy)


SECONDS = 3.0


def database(config: Config) -> Iterator[Finding]:
    """Check whether the database answers and which migrations are pending."""
    path = _sqlite_path(config)
    if is_absent(config):
        yield Finding("database", "warning", f"{path} does not exist", "corral serve or corral migrate makes it")
        return
    try:
        with _connected(config) as found:
            found.ping()
            yield Finding("database", "ok", f"{found.kind} answers")
            yield from _migrations(config, found)
    except Refused as refused:
        yield from (Finding("database", "down", fault) for fault in refused.faults)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        remedy = "start it, or correct [database] url" if path is None else f"if {path} is damaged, restore a backup"
        yield Finding("database", "down", f"does not answer: {reason}", remedy)


def _migrations(config: Config, found: Database) -> Iterator[Finding]:
    from corral.database.migrations import SchemaTooNew, is_empty, pending_migrations
    from corral.plugins.discovery import discover
    from corral.plugins.loading import load
    from corral.plugins.migrations import migrates_on_start, migrations_of

    try:
        waiting = pending_migrations(found, migrations_of(load(discover(config), config)))
    except SchemaTooNew as error:
        yield Finding("migrations", "down", str(error), "install the release that made this database")
        return
    if not waiting:
        yield Finding("migrations", "ok", "none pending")
        return
    names = "; ".join(f"{plugin}: {', '.join(scripts)}" for plugin, scripts in waiting.items())
    if is_empty(found):
        yield Finding("migrations", "warning", "the database is empty", "the next start fills it, or corral migrate")
    elif migrates_on_start(config, found.kind):
        yield Finding("migrations", "warning", f"pending: {names}", "the next start applies them, or corral migrate")
    else:
        yield Finding("migrations", "down", f"pending: {names}", "back the database up, then corral migrate")


def is_sealed(config: Config, keyring: Keyring) -> bool:
    """Return whether there are encrypted rows and none of these keys can decrypt any of them."""
    from corral.plugins.discovery import discover
    from corral.plugins.loading import load
    from corral.plugins.migrations import sealed_columns

    if is_absent(config):
        return False
    known = {key.id for key in keyring.keys}
    try:
        columns = sealed_columns(load(discover(config), config))
        with _connected(config) as found:
            stored = found.run(lambda: columns.key_ids(known), read=True)
    except Exception:  # another check reports an unusable database or schema
        return False
    return bool(stored) and stored.isdisjoint(known)


def database_skew(config: Config) -> float | None:
    """Return by how many seconds the database's clock is ahead of this machine's clock.

    On SQLite, the result is by how much the newest event lies in the future, or 0. None if the skew is unknown.
    """
    from corral.database.migrations import own_connection

    if is_absent(config):
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
    """Ping Redis with the library that the server uses. Return None if Redis answers, otherwise the reason."""
    from redis import Redis

    try:
        with Redis.from_url(url, socket_timeout=SECONDS, socket_connect_timeout=SECONDS) as client:
            client.ping()
    except Exception as error:  # an unknown option in the URL is a TypeError
        return f"cannot be used: {error}"
    return None


def has_bus(config: Config) -> bool:
    """Return whether an active plugin supports the Redis URL. Without such a plugin the server does not start."""
    from corral.plugins.discovery import discover
    from corral.plugins.hooks import first_result
    from corral.plugins.loading import load

    try:
        first_result(load(discover(config), config), "corral_bus", config.redis.url or "")
    except Refused:
        return False
    return True


def ping_store(config: Config) -> str | None:
    """Return None if a plugin supports the storage URL and the store answers, otherwise the reason."""
    import asyncio

    from corral.plugins.discovery import discover
    from corral.plugins.loading import load

    url = config.storage.url or ""
    for loaded in load(discover(config), config):
        serve = getattr(loaded.plugin, "corral_blob_store", None) if loaded.active else None
        store = serve(url=url) if serve is not None else None
        if store is not None:
            return asyncio.run(_look_into(store))
    return f"no active plugin serves {urlsplit(url).scheme}:// storage"


async def _look_into(store: Any) -> str | None:
    import asyncio

    try:
        async with asyncio.timeout(SECONDS):
            await store.probe()
    except Exception as error:
        return f"does not answer: {type(error).__name__}: {error}"
    return None


@contextlib.contextmanager
def _connected(config: Config) -> Iterator[Database]:
    from corral.database.connect import connect

    found = connect(config.database.url, pool_size=1)
    try:
        yield found
    finally:
        found.close()


def is_absent(config: Config) -> bool:
    """Return whether the database is an SQLite file that does not exist.

    Raises `PermissionError` if the folder of the file cannot be accessed.
    """
    path = _sqlite_path(config)
    return path is not None and not path.exists()


def _sqlite_path(config: Config) -> Path | None:
    url = config.database.url
    return Path(url.removeprefix("sqlite:///")) if url.startswith("sqlite:///") else None


def modified_files(config: Config) -> Iterator[tuple[str, list[str]]]:
    """Yield `(distribution, modified files)` of the enabled third-party plugins, by the checksums in their RECORD."""
    wanted = {found.distribution for found in discover(config) if found.name in config.plugins.enabled}
    for distribution in metadata.distributions():
        name = str(distribution.metadata["Name"]).lower()
        if name in wanted:
            wanted.discard(name)  # only the first on the import path is used
            files = [str(path) for path in distribution.files or () if _differs(path)]
            if files:
                yield name, files


def _differs(path: metadata.PackagePath) -> bool:
    """Return whether a file is missing or changed. Files without a checksum in RECORD are never reported."""
    if path.hash is None or path.suffix == ".pyc":
        return False
    try:
        found = hashlib.new(path.hash.mode, Path(str(path.locate())).read_bytes()).digest()
    except (OSError, ValueError):
        return True
    return base64.urlsafe_b64encode(found).rstrip(b"=").decode() != path.hash.value
