"""The pytest plugin of the test kit: fixtures for kernels on real database servers.

The kernel is imported only when a fixture is used.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from corral.testing.database_servers import PostgresServer, ValkeyServer
    from corral.testing.kit import Kit


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the `--long` option, which runs long tests and benchmarks in their full form."""
    parser.addoption("--long", action="store_true", help="run long tests and benchmarks at full length")


@pytest.fixture
def long_form(request: pytest.FixtureRequest) -> bool:
    """Return whether tests run in their long form, which the option `--long` selects."""
    return bool(request.config.getoption("--long"))


@pytest.fixture(autouse=True)
def _reset_clock() -> Iterator[None]:
    yield
    from corral import clock

    clock.reset()


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """Yield a PostgreSQL server, which all tests of the session share. Each test must create its own database."""
    from corral.testing.database_servers import PostgresServer

    with PostgresServer() as server:
        yield server


@pytest.fixture
def valkey_server() -> Iterator[ValkeyServer]:
    """Yield a Valkey server for one test. The test may empty, stop or kill the server. Use `url()` as `[redis] url`."""
    from corral.testing.database_servers import ValkeyServer

    with ValkeyServer() as server:
        yield server


@pytest.fixture(
    params=[pytest.param("sqlite", marks=pytest.mark.sqlite), pytest.param("postgres", marks=pytest.mark.postgres)]
)
def unmade_database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Yield the URL of a database that does not exist yet. The test runs once for each database engine.

    `make_kernel` creates the database. It is removed at the end of the test.
    """
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/corral.db"
        return
    server: PostgresServer = request.getfixturevalue("postgres_server")
    url = server.unused_database_url()
    yield url
    server.drop_database(url)


@pytest.fixture
def database_url(request: pytest.FixtureRequest, unmade_database_url: str) -> str:
    """Return the URL of a database that exists. The test runs once for each database engine.

    The database is empty, unless the test requested the fixture `kit` first. In that case, the URL is that of the kit's
    database.
    """
    if unmade_database_url.startswith("sqlite:"):
        return unmade_database_url
    from psycopg.errors import DuplicateDatabase

    server: PostgresServer = request.getfixturevalue("postgres_server")
    with suppress(DuplicateDatabase):
        server.create_database(url=unmade_database_url)
    return unmade_database_url


@pytest.fixture
async def make_kit(tmp_path: Path, unmade_database_url: str) -> AsyncIterator[Callable[..., Any]]:
    """Yield a function that starts kernels on the database engine of this test: `kit = await make_kit(**options)`.

    The options are those of `make_kernel`. The kernels are stopped at the end of the test.
    """
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
    """Return a kit with all built-in plugins. The test runs once for each database engine."""
    made: Kit = await make_kit()
    return made
