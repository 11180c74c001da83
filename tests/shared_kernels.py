"""Kernels that the tests of a module share, because booting one takes longer than most tests.

A test may share a kernel if it asserts only about what it has created itself, and leaves no change that others notice:
neither a setting, nor a plugin that is switched off, nor work that another test could claim. Such tests carry
`on_the_loop_of_the_module`, because a kernel belongs to the event loop that it was started on.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio

if TYPE_CHECKING:
    from corral.testing.kit import Kit

on_the_loop_of_the_module = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(
    scope="module",
    params=[pytest.param("sqlite", marks=pytest.mark.sqlite), pytest.param("postgres", marks=pytest.mark.postgres)],
)
def shared_database_url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Yield the URL of a database that does not exist yet, for all tests of the module, once for each engine."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path_factory.mktemp('shared')}/corral.db"
        return
    server = request.getfixturevalue("postgres_server")
    url = server.unused_database_url()
    yield url
    server.drop_database(url)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def make_shared_kit(
    shared_database_url: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Callable[..., Any]]:
    """Yield a function that starts kernels like `make_kit` does. They are stopped after the tests of the module."""
    from corral.testing.kit import make_kernel

    async with AsyncExitStack() as stack:

        async def make(**options: Any) -> Kit:
            folder = tmp_path_factory.mktemp("kernel")
            return await stack.enter_async_context(
                make_kernel(folder, **{"database_url": shared_database_url, **options})
            )

        yield make
