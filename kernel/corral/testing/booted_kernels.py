"""Kernels that several tests use, one after the other, because booting one takes far longer than putting it back.

A kernel is booted once for each set of plugins and configuration. Before another test uses it, `ObjectState` puts its
memory back to the moment after the boot, and its database and its data folder are those of a new installation. What
belongs to threads and to the event loop is made new. The tests therefore cannot tell such a kernel from a new one.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import shutil
import tempfile
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import msgspec

from corral.asgi.application import Application
from corral.kernel import Kernel
from corral.plugins.discovery import Found
from corral.plugins.thread_pool import SIZE
from corral.testing.booting import KernelOptions, boot_prepared, create_database, has_migrations, prepare
from corral.testing.object_state import ObjectState, UnknownState

LIMIT = 12  # each kernel takes some 10 MB
QUIET_TRIES = 5000
LINK = "installation"


class BootedKernel:
    """A kernel that was booted but not started, and its state at that time.

    Its configuration names a link, which leads to the folder of the test that uses the kernel.
    """

    def __init__(
        self, key: Hashable, place: Place, found: list[Found], kernel: Kernel, application: Application
    ) -> None:
        self.key, self.place, self.names = key, place, _names(found)
        self.kernel, self.application = kernel, application
        self._state: ObjectState | None = None  # None if the kernel can be used only once
        self._database = {name: getattr(kernel.database, name) for name in ("flush", "cursor_key", "jobs")}
        self._labels = dict(kernel.database.plugin_by_label)
        folder = kernel.config.data_dir
        self._files = {
            path.relative_to(folder): path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file() and not path.name.startswith("corral.db")
        }

    def record(self) -> None:
        """Record the state, so that the kernel can be used again, unless a plugin has a state of an unknown kind."""
        kernel = self.kernel
        with contextlib.suppress(UnknownState):
            opaque = (kernel.database, kernel.threads, kernel.loop_watch)
            self._state = ObjectState([kernel, self.application], opaque=opaque)

    def put_back(self, url: str) -> None:
        """Put the kernel and the files of its data folder back to the moment after the boot."""
        if self._state is not None:
            self._state.restore()
        kernel, folder = self.kernel, self.kernel.config.data_dir
        for path, content in self._files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)
            (folder / path).chmod(0o600)
        section = msgspec.structs.replace(kernel.config.database, url=url)
        kernel.config = msgspec.structs.replace(kernel.config, database=section)
        self._make_threads_new(url)

    def _make_threads_new(self, url: str) -> None:
        """Make the database, the threads and the watchdog new in the objects that other objects already refer to."""
        kernel, section = self.kernel, self.kernel.config.database
        database: Any = kernel.database
        if database.is_file:
            database.__init__(url.removeprefix("sqlite:///"), synchronous=section.synchronous)
        else:
            database.__init__(url, pool_size=section.pool_size)
        vars(database).update(self._database)
        database.plugin_by_label.update(self._labels)
        threads: Any = kernel.threads
        threads.__init__(database.watchdog, SIZE)
        watch: Any = kernel.loop_watch
        watch.__init__(database.watchdog)

    async def is_reusable(self) -> bool:
        """Return whether the state is recorded, and no thread of the stopped kernel can change it any more."""
        for _ in range(QUIET_TRIES):
            if self._state is None or not self._is_running():
                break
            await asyncio.sleep(0.001)  # a thread delivers its result a moment before it ends
        return self._state is not None and not self._is_running()

    def _is_running(self) -> bool:
        database = self.kernel.database
        threads = [thread for pool in database.pools for thread in pool.threads if thread.is_alive()]
        return bool(threads or self.kernel.threads._running or database.watchdog._abandoned)


class Place:
    """A link to the folder of the test that uses a kernel. The link keeps its path, so configurations can name it."""

    def __init__(self) -> None:
        self._parent = Path(tempfile.mkdtemp(prefix="corral-kit-"))
        self.path = self._parent / LINK
        atexit.register(self.remove)

    def lead_to(self, folder: Path) -> None:
        """Let the link lead to this folder, which is created if it is missing."""
        folder.mkdir(parents=True, exist_ok=True)
        self.path.unlink(missing_ok=True)
        self.path.symlink_to(folder.absolute(), target_is_directory=True)

    def remove(self) -> None:
        """Remove the link."""
        atexit.unregister(self.remove)
        shutil.rmtree(self._parent, ignore_errors=True)


class BootedKernels:
    """The kernels of this process that no test uses at the moment, by what distinguishes them.

    A kernel is kept only from the second test with the same options on, because recording a state takes as long as a
    boot.
    """

    def __init__(self) -> None:
        self._kept: dict[Hashable, BootedKernel] = {}
        self._seen: set[int] = set()

    def take(self, folder: Path, options: KernelOptions) -> BootedKernel | None:
        """Return a kernel that is as after a boot in this folder, for one user until it is returned by `keep`.

        Return None if these options occur for the first time, or the folder contains an installation.
        """
        key = _key(options)
        if hash(key) not in self._seen or folder.joinpath("data").exists():
            self._seen.add(hash(key))
            return None
        booted = self._kept.pop(key, None)
        place = Place() if booted is None else booted.place
        place.lead_to(folder)
        config, found = prepare(place.path, options)
        is_new = create_database(config, found)
        if booted is None or not is_new or booted.names != _names(found):
            booted = BootedKernel(key, place, found, *boot_prepared(config, found, is_new=is_new))
            if is_new and not has_migrations(booted.kernel.plugins):
                booted.record()
            booted.kernel.database.close()
        booted.put_back(config.database.url)
        return booted

    async def keep(self, booted: BootedKernel) -> None:
        """Keep a stopped kernel for others, unless something of it still runs."""
        if not await booted.is_reusable() or booted.key in self._kept:
            booted.place.remove()
            return
        self._kept[booted.key] = booted
        if len(self._kept) > LIMIT:
            self._kept.pop(next(iter(self._kept))).place.remove()


def _names(found: list[Found]) -> list[tuple[str, str]]:
    return [(item.name, item.distribution) for item in found]


def _key(options: KernelOptions) -> Hashable:
    database = (options.database_url or "").partition(":")[0]
    plugins = None if options.plugins is None else tuple(options.plugins)
    return plugins, database, repr(sorted(options.config.items())), repr(sorted(options.environ.items()))


booted_kernels = BootedKernels()
