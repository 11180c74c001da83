"""Starts kernels for commands, either with the installation's database or in a temporary folder."""

from __future__ import annotations

import contextlib
import logging
import os
import pwd
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
import msgspec

from corral.auth.principal import Principal
from corral.cli import logging_setup
from corral.cli.damaged_database import explain_damage
from corral.cli.data_folder import ensure_data_dir, restrict_new_files
from corral.config.model import Config, Database, Keys, Redis, Storage
from corral.config.reader import load as load_config
from corral.database.unit import Actor, UnitContext
from corral.errors import StartupError
from corral.plugins.container import WiringError
from corral.settings.store import SettingsStore

if TYPE_CHECKING:
    from corral.kernel import Kernel

T = TypeVar("T")


def operator_name() -> str:
    """Return the name of the operating-system user, which the audit log records as the actor of a command."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # a user without a name, as in containers
        return f"uid {os.getuid()}"


class Session:
    """A kernel for one command. The actor of its units of work is the operating-system user."""

    def __init__(self, kernel: Kernel, label: str) -> None:
        self.kernel = kernel
        self.entry = UnitContext(label=f"command {label}", actor=Actor("system", operator_name()))
        self.caller = Principal(kind="system", id=operator_name(), role="admin")

    def service(self, kind: Any) -> Any:
        """Return the service of the given type."""
        return self.kernel.container.get(kind)

    def run(self, fn: Callable[[], T], *, read: bool = False) -> T:
        """Run `fn` as one unit of work, wait for the commit, and return the result."""
        return self.kernel.database.run(fn, entry=self.entry, read=read)


def has_installation(config: Config) -> bool:
    """Return whether the configured database exists. A database on a server is assumed to exist."""
    file = config.database.url.removeprefix("sqlite:///")
    return file == config.database.url or Path(file).exists()


@contextlib.contextmanager
def open_session(config_path: Path | None, label: str, *, create: bool = False) -> Iterator[Session]:
    """Open a session whose kernel uses the installation's own database. A server may be running at the same time.

    Raise `MigrationsPending` if migrations are pending. Raise `StartupError` if the data folder contains no
    installation and `create` is not set, because the command would otherwise create a new installation and act on it.
    If `CORRAL_URL` is set, a warning on standard error says that it does not count.
    """
    config = load_config(path=config_path)
    if os.environ.get("CORRAL_URL"):
        told = f"`corral {label}` acts on the data folder {config.data_dir}, not on the server that CORRAL_URL names."
        click.echo(f"Warning: {told}", err=True)
    if not create and not has_installation(config):
        raise StartupError(
            f"there is no installation in {config.data_dir}; change to the installation's working directory, or set "
            "--config or CORRAL_DATA_DIR"
        )
    logging_setup.configure("critical", "console")  # `corral doctor` reports failures of plugins
    umask = restrict_new_files()
    try:
        ensure_data_dir(config)
        with _booted_kernel(config) as kernel:
            found = Session(kernel, label)
            with contextlib.suppress(WiringError):  # the `settings` plugin failed: defaults apply, as in a server
                found.run(found.service(SettingsStore).apply_stored, read=True)
            yield found
    finally:
        os.umask(umask)


@contextlib.contextmanager
def temporary_kernel(config: Config) -> Iterator[Kernel]:
    """Boot a kernel with the configured plugins on an empty database in a temporary folder."""
    folder = Path(tempfile.mkdtemp(prefix="corral-"))
    logging.disable(logging.CRITICAL)  # the states of the plugins show failures
    try:
        elsewhere = msgspec.structs.replace(
            config,
            data_dir=folder,
            database=Database(url=f"sqlite:///{folder}/corral.db"),
            redis=Redis(),
            storage=Storage(),
            keys=Keys(),
            plugins=msgspec.structs.replace(config.plugins, strict=False),
            bootstrap_admin_email=None,
            bootstrap_admin_password=None,
        )
        with _booted_kernel(elsewhere) as kernel:
            yield kernel
    finally:
        logging.disable(logging.NOTSET)
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _booted_kernel(config: Config) -> Iterator[Kernel]:
    from corral.kernel import boot

    with explain_damage(config):
        kernel = boot(config)
    try:
        yield kernel
    finally:
        kernel.database.close()
