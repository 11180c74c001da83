"""Settings for the whole suite: garbage collection, temporary folders, generated cases, and the order of the tests."""

from __future__ import annotations

import gc
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from _pytest.faulthandler import fault_handler_stderr_fd_key
from _pytest.pathlib import import_path
from _pytest.unraisableexception import gc_collect_iterations_key
from hypothesis import HealthCheck, settings
from tests.kernel.cli.warm import SERVERS, WORKERS, warm
from tests.shared_kernels import make_shared_kit, shared_database_url

__all__ = ["make_shared_kit", "shared_database_url"]

MEMORY, MEMORY_NEEDED = Path("/dev/shm"), 8 * 2**30

# These tests mostly wait for servers and timers, so they run beside the tests that compute, not after them. So do those
# of all modules that start one of these processes.
WAITING = (
    "tests/benchmarks/",
    "tests/promises/",
    "tests/end_to_end/",
    "tests/kernel/redis/",
    "tests/kernel/isolation/",
    "tests/plugins/workers/node/",
)
PROCESSES = ("ServerProcess", "JobsProcess", "WorkerProcess")


def pytest_configure(config: pytest.Config) -> None:
    """Collect garbage as the server does, keep temporary folders in memory, and let generated cases take their time.

    No test checks that data outlives a power cut, so memory is as good as a disk. How long an example takes depends on
    the load of the machine and is no property of the code.
    """
    settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("suite")
    gc.set_threshold(20_000, 20, 20)
    config.stash[gc_collect_iterations_key] = 1  # at the end; five times, as pytest would, take seconds
    # Images of containers set this variable. Each server that a test starts would compile all modules again, for two
    # seconds of processor time.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False
    with suppress(OSError):
        found = os.statvfs(MEMORY)
        if found.f_bavail * found.f_frsize >= MEMORY_NEEDED and not found.f_flag & getattr(os, "ST_NOEXEC", 0):
            os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))


def pytest_sessionstart(session: pytest.Session) -> None:
    """Let a process of a parallel run write its stacks to a file of its own when it crashes or hangs.

    `pytest_handlecrashitem` adds them to the report of the test. On standard error they would be lost among the dots.
    """
    if (worker := getattr(session.config, "workerinput", None)) is not None:
        with crash_file(worker).open("wb") as opened:
            os.dup2(opened.fileno(), session.config.stash[fault_handler_stderr_fd_key], inheritable=False)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the file of a process that has not crashed."""
    if (worker := getattr(config, "workerinput", None)) is not None:
        crash_file(worker).unlink(missing_ok=True)


@pytest.hookimpl(optionalhook=True)
def pytest_handlecrashitem(report: Any) -> None:
    """Add the stacks of a crashed process to the report of the test that it was running."""
    path = crash_file(report.node.workerinput)
    stacks = path.read_text(errors="replace") or "It left no stack: it was killed, or it called os._exit."
    report.longrepr += f"\n{stacks}"
    path.unlink()


def crash_file(worker: Mapping[str, Any]) -> Path:
    """Return where this process of a parallel run writes its stacks."""
    return Path(tempfile.gettempdir()) / f"corral-crash-{worker['testrunuid']}-{worker['workerid']}.txt"


def pytest_collection(session: pytest.Session) -> None:
    """Import the test modules of a run of the whole suite, beginning with those that no other process begins with.

    Compiling them takes longer than importing them. On a fresh clone, each process would compile all of them; in this
    order, it finds most of them compiled by the others.
    """
    folder = Path(__file__).parent
    if [session.config.invocation_params.dir / each for each in session.config.args] != [folder]:
        return
    name, count = os.environ.get("PYTEST_XDIST_WORKER", "gw0"), int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    paths = sorted(folder.rglob("test_*.py"))
    first = len(paths) * int(name.removeprefix("gw")) // count
    for path in [*paths[first:], *paths[:first]]:
        with suppress(Exception, pytest.skip.Exception):  # the collection reports it
            import_path(path, mode="importlib", root=session.config.rootpath, consider_namespace_packages=False)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the PostgreSQL run of `one_engine` tests unless `--long` is given. Put the tests that wait first."""
    if not config.getoption("--long", default=False):
        twice = [
            item for item in items if item.get_closest_marker("one_engine") and item.get_closest_marker("postgres")
        ]
        config.hook.pytest_deselected(items=twice)
        items[:] = [item for item in items if item not in {*twice}]
    items[:] = waiting_first(items, int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))


def waiting_first(items: Sequence[pytest.Item], processes: int) -> list[pytest.Item]:
    """Return the tests in the order in which they run.

    With `--dist worksteal` each process begins with an equal share of the list, and takes tests of the others when it
    has done its own. The files of the tests that wait are divided between the first two shares and come first in both.
    """
    waiting = [item for path in WAITING for item in items if item.nodeid.startswith(path)]
    waiting += [item for item in items if not item.nodeid.startswith(WAITING) and starts_processes(item)]
    known = {*waiting}
    others = [item for item in items if item not in known]
    if processes < 3:
        return [*waiting, *others]
    files = list(dict.fromkeys(item.path for item in waiting))
    one, two = ([item for item in waiting if item.path in half] for half in ({*files[::2]}, {*files[1::2]}))
    share = max(len(items) // processes - len(one), 0)
    return [*one, *others[:share], *two, *others[share:]]


def starts_processes(item: pytest.Item) -> bool:
    """Return whether the module of a test starts servers or workers."""
    return any(hasattr(getattr(item, "module", None), name) for name in PROCESSES)


@pytest.fixture(scope="session", autouse=True)
def _hashes_are_cheap() -> None:
    """Hash the passwords of this process, which guard nothing, without the cost that makes guessing slow."""
    from corral_core.accounts.service import passwords

    passwords.TIME_COST, passwords.MEMORY_KIB = 1, 8
    passwords._argon2_hasher.cache_clear()
    passwords.DUMMY_HASH = passwords._argon2_hasher().hash("nobody's password")


@pytest.fixture(scope="session", autouse=True)
def _servers_are_forked(request: pytest.FixtureRequest) -> Iterator[None]:
    """Start servers and workers as forks of a process that has imported Corral, on databases that are migrated.

    This saves most of the processor time of a start.

    In the long forms of the promises, which report how long a start takes, servers start like any program.
    """
    if request.config.getoption("--long", default=False):
        yield
        return
    from tests.migrated import migrate_by_copy

    from corral.testing import server

    plain = server.start_process

    def fork(arguments: Sequence[str], *, environ: Mapping[str, str], folder: Path, log: Path) -> Any:
        if any(name.startswith("PYTHON") and os.environ.get(name) != value for name, value in environ.items()):
            return plain(arguments, environ=environ, folder=folder, log=log)  # for another interpreter than this one
        if arguments[0] == "serve":
            migrate_by_copy(environ, folder)
        modules = WORKERS if arguments[0] == "worker" else SERVERS
        return warm(*modules).start(arguments, cwd=folder, environ=environ, log=log)

    server.start_process = fork
    yield
    server.start_process = plain


def pytest_collection_finish(session: pytest.Session) -> None:
    """All modules and items are here to stay: no collection looks through them again."""
    gc.collect()
    gc.freeze()
