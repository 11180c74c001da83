"""`If-Match` on deletions, while another request changes the object. Only PostgreSQL runs units at the same time."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from tests.generated.operations import Operation
from tests.generated.resources import asked, of
from tests.generated.world import World
from tests.shared_kernels import on_the_loop_of_the_module

from corral.database.model import Model
from corral.database.unit import current

pytestmark = pytest.mark.postgres

WAITING = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
VERSIONS = ("version", "revision")


@pytest.fixture(scope="module")
def shared_database_url(postgres_server: Any) -> Iterator[str]:
    url = postgres_server.unused_database_url()
    yield url
    postgres_server.drop_database(url)


def deletions(world: World) -> list[Operation]:
    """The deletions that take `If-Match`."""
    return [
        each
        for each in world.operations
        if each.method == "DELETE" and any(one["name"] == "If-Match" for one in each.spec["parameters"])
    ]


def find_row(id: str) -> tuple[str, str, str, int]:
    """Return the table, the key, the column of the version and the version of the object with this id or name."""
    tables = current().database.engine.get_tables()
    for model in _models(Model):
        key, version = model._meta.primary_key, next((each for each in VERSIONS if each in model._meta.fields), None)
        if version is None or not hasattr(key, "column_name") or model._meta.table_name not in tables:
            continue
        row = model.get_or_none(key == id)
        if row is not None:
            return model._meta.table_name, key.column_name, version, getattr(row, version)
    raise AssertionError(f"no table has a version of {id}")


def _models(parent: type[Model]) -> Iterator[type[Model]]:
    for each in parent.__subclasses__():
        yield each
        yield from _models(each)


@on_the_loop_of_the_module
async def test_a_deletion_meets_a_change_that_comes_first(world: World, shared_database_url: str) -> None:
    """Conventions, concurrency: a stale `If-Match` is 412, whenever the other change was committed."""
    other, watcher = psycopg.connect(shared_database_url), psycopg.connect(shared_database_url, autocommit=True)
    faults: list[str] = []
    for operation in deletions(world):
        kind = of(operation)
        names = await kind.make(world, world.owner)
        id = names[re.findall(r"\{([a-z_]+)\}", operation.path)[-1]]
        table, key, column, version = await world.kit.work(lambda id=id: find_row(id), read=True)  # type: ignore[misc]  # bound per round
        other.execute(f"UPDATE {table} SET {column} = {column} + 1 WHERE {key} = %s", (id,))
        client = world.admin if kind.kind in ("admin", "managed", "account") else world.owner
        path, _ = asked(operation, names)
        request = client.request("DELETE", path, headers={"If-Match": f'"{version}"'})
        deletion = asyncio.ensure_future(request)
        ends = time.monotonic() + 60
        while watcher.execute(WAITING).fetchone()[0] == 0 and not deletion.done():  # type: ignore[index]  # a count is one row
            assert time.monotonic() < ends
            await asyncio.sleep(0.005)
        other.commit()
        answer = await deletion
        if answer.status != 412:
            faults.append(f"{operation.label} answers {answer}")
    other.close()
    watcher.close()
    assert len(deletions(world)) > 5
    assert not faults, "\n".join(faults)
