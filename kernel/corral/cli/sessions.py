"""Kernels for commands: one on the installation's database, and one in a temporary folder that leaves no trace."""

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

import msgspec

from corral.auth.principal import Principal
from corral.cli import logs
from corral.config.model import Config, Database, Keys, Redis, Storage
from corral.config.reader import ensure_data_dir
from corral.config.reader import load as load_config
from corral.database.unit import Actor, Entry
from corral.errors import Refused
from corral.plugins.container import WiringError
from corral.settings.store import SettingsStore

if TYPE_CHECKING:
    from corral.kernel import Kernel

T = TypeVar("T")


def operator() -> str:
    """The operating-system user's name: who acts when a command does."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # an account of a container that has no name
        return f"uid {os.getuid()}"


class Session:
    """A kernel for one command: `run(fn)` is a unit of work whose actor is the operating-system user."""

    def __init__(self, kernel: Kernel, label: str) -> None:
        self.kernel = kernel
        self.entry = Entry(label=f"command {label}", actor=Actor("system", operator()))
        self.caller = Principal(kind="system", id=operator(), role="admin")

    def service(self, kind: Any) -> Any:
        """A service by type."""
        return self.kernel.container.get(kind)

    def run(self, fn: Callable[[], T], *, read: bool = False) -> T:
        """Run `fn` as one unit and wait for its COMMIT."""
        return self.kernel.database.run(fn, entry=self.entry, read=read)


@contextlib.contextmanager
def session(config_path: Path | None, label: str, *, create: bool = False) -> Iterator[Session]:
    """A kernel on the installation's own database, beside a running server. Raises `Refused` and `Pending`.

    In a folder without an installation it is refused unless it may `create` one: a new one would obey in place of the
    one that was meant.
    """
    config = load_config(path=config_path)
    file = config.database.url.removeprefix("sqlite:///")
    if not create and file != config.database.url and not Path(file).exists():
        raise Refused(
            f"there is no installation in {config.data_dir}: go to the folder where it runs, or name it by --config "
            "or CORRAL_DATA_DIR"
        )
    logs.configure("critical", "console")  # what fails of the plugins is the business of `corral doctor`
    ensure_data_dir(config)
    with _closing(config) as kernel:
        found = Session(kernel, label)
        with contextlib.suppress(WiringError):  # the plugin `settings` failed: defaults rule, as they do in a server
            found.run(found.service(SettingsStore).adopt, read=True)
        yield found


@contextlib.contextmanager
def scratch(config: Config) -> Iterator[Kernel]:
    """A kernel with the same plugins and their configuration, on an empty database in a temporary folder."""
    folder = Path(tempfile.mkdtemp(prefix="corral-"))
    logging.disable(logging.CRITICAL)  # what fails is told by the states of the plugins
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
        with _closing(elsewhere) as kernel:
            yield kernel
    finally:
        logging.disable(logging.NOTSET)
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _closing(config: Config) -> Iterator[Kernel]:
    from corral.kernel import boot

    kernel = boot(config)
    try:
        yield kernel
    finally:
        kernel.database.close()
