"""What `corral doctor` looks at. Each check reads only, and gives findings of `ok`, `warning` or `down`."""

from __future__ import annotations

import asyncio
import ctypes
import os
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from corral import clock
from corral.cli import services
from corral.cli.distributions import modified_files
from corral.config.model import Config
from corral.config.reader import readable_by_others
from corral.crypto import KEY_FILE, Keyring
from corral.errors import Refused

LOW_BYTES, FULL_BYTES = 1 << 30, 100 << 20
SKEW_WARNING, SKEW_DOWN = 2.0, 30.0
UNSYNCHRONISED = 5  # adjtimex(2): TIME_ERROR


class Finding(NamedTuple):
    """One line: what was looked at, how it is, and what to do."""

    check: str
    status: str  # ok | warning | down
    detail: str
    remedy: str = ""

    def row(self) -> dict[str, Any]:
        """As JSON."""
        return {"check": self.check, "status": self.status, "detail": self.detail, "remedy": self.remedy or None}


def installation(config: Config) -> Iterator[Finding]:
    """All findings. A check that fails itself is a finding, and the others go on."""
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
        path.open("rb").close()  # that it may not be read is another fault than a wrong key
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
    if services.is_sealed(config, keyring):
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
    yield from services.database(config)


def _redis(config: Config) -> Iterator[Finding]:
    if config.redis.url is None:
        yield Finding("redis", "ok", "not configured")
        return
    error = services.ping_redis(config.redis.url)
    if error is not None:
        yield Finding("redis", "down", error, "start it, or correct [redis] url; until then the database announces")
    elif not services.has_bus(config):
        yield Finding("redis", "down", "answers, but no active plugin serves it", "install one, or remove [redis] url")
    else:
        yield Finding("redis", "ok", "answers")


def _storage(config: Config) -> Iterator[Finding]:
    folder = config.files_dir
    if folder is None:
        error = services.ping_store(config)
        remedy = "correct [storage] url, its keys or the network"
        yield Finding("storage", "down", error, remedy) if error else Finding("storage", "ok", "answers")
    elif folder.exists() and not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        yield Finding("storage", "down", f"{folder} cannot be written", "give it to the account that serves")
    else:
        yield Finding("storage", "ok", f"not configured; files lie in {folder}")


def mail(config: Config) -> Iterator[Finding]:
    """Of the file and the environment; what admins have stored is tested by `POST /settings/test-mail`."""
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
    skew = services.database_skew(config)
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
    """What the operating system says of its clock; true where it says nothing."""
    if not sys.platform.startswith("linux"):
        return True
    try:
        return int(ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(512))) != UNSYNCHRONISED  # zeros: only ask
    except (OSError, AttributeError):
        return True


def _plugins(config: Config) -> Iterator[Finding]:
    from corral.asgi.application import Application
    from corral.cli.kernels import scratch

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
    """What the file names and is not there."""
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
