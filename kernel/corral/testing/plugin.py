"""The pytest plugin of the kit: fixtures for kernels on real engines.

Imports the kernel only when a fixture is used.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from corral.testing.engines import PostgresServer, ValkeyServer
    from corral.testing.kit import Kit


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--long`: promises and benchmarks in their full form."""
    parser.addoption("--long", action="store_true", help="run promises and benchmarks in their full form")


@pytest.fixture
def long_form(request: pytest.FixtureRequest) -> bool:
    """Whether `--long` was given."""
    return bool(request.config.getoption("--long"))


@pytest.fixture(autouse=True)
def _right_time() -> Iterator[None]:
    yield
    from corral import clock

    clock.reset()


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """One PostgreSQL for the session; take a database of your own from it."""
    from corral.testing.engines import PostgresServer

    with PostgresServer() as server:
        yield server


@pytest.fixture
def valkey_server() -> Iterator[ValkeyServer]:
    """A Valkey of the test's own, which it may empty, stop and kill: `url()` is fit for `[redis] url`."""
    from corral.testing.engines import ValkeyServer

    with ValkeyServer() as server:
        yield server


@pytest.fixture(
    params=[pytest.param("sqlite", marks=pytest.mark.sqlite), pytest.param("postgres", marks=pytest.mark.postgres)]
)
def unmade_database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Where a database may be made, once on each engine: `make_kernel` makes it. It is removed at the end."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/corral.db"
        return
    server: PostgresServer = request.getfixturevalue("postgres_server")
    url = server.unused_url()
    yield url
    server.drop_database(url)


@pytest.fixture
def database_url(request: pytest.FixtureRequest, unmade_database_url: str) -> str:
    """A database, once on each engine: an empty one, or that of the kit which the test asked for before."""
    if unmade_database_url.startswith("sqlite:"):
        return unmade_database_url
    from psycopg.errors import DuplicateDatabase

    server: PostgresServer = request.getfixturevalue("postgres_server")
    with suppress(DuplicateDatabase):
        server.create_database(url=unmade_database_url)
    return unmade_database_url


@pytest.fixture
async def make_kit(tmp_path: Path, unmade_database_url: str) -> AsyncIterator[Callable[..., Any]]:
    """`kit = await make_kit(**options of make_kernel)`: kernels on this test's engine, stopped at its end."""
    from corral.testing.kit import make_kernel

    async with AsyncExitStack() as stack:

        async def make(**options: Any) -> Kit:
            manager: AbstractAsyncContextManager[Kit] = make_kernel(
                tmp_path, **{"database_url": unmade_database_url, **options}
            )
            return await stack.enter_async_context(manager)

        yield make


@pytest.fixture
async def kit(make_kit: Callable[..., Any]) -> Kit:
    """A kernel with all built-in plugins, on each engine."""
    made: Kit = await make_kit()
    return made
