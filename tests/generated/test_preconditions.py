"""`If-Match` on deletions, while another request changes the object. Only PostgreSQL runs units at the same time."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import Any

import peewee
import pytest
from tests.generated.operations import Operation
from tests.generated.resources import asked, of
from tests.generated.world import World
from tests.rival import Rival
from tests.shared_kernels import on_the_loop_of_the_module

from corral.database.model import Model
from corral.database.unit import current

pytestmark = pytest.mark.postgres

VERSIONS = ("revision", "version")


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
        if each.method == "DELETE" and each.route.signature is not None and each.route.signature.if_match is not None
    ]


def find_row(ids: list[str]) -> tuple[str, str, str, str, int]:
    """Return the table, the key, its value, the column of the version and the version of the last of the objects."""
    tables = current().database.engine.get_tables()
    for model in _models(Model):
        key, version = model._meta.primary_key, next((each for each in VERSIONS if _is_number(model, each)), None)
        if version is None or not isinstance(key, peewee.CharField) or model._meta.table_name not in tables:
            continue
        for id in reversed(ids):
            row = model.get_or_none(key == id)
            if row is not None:
                return model._meta.table_name, key.column_name, id, version, getattr(row, version)
    raise AssertionError(f"no table has a version of one of {ids}")


def _is_number(model: type[Model], column: str) -> bool:
    return isinstance(model._meta.fields.get(column), peewee.IntegerField)


def _models(parent: type[Model]) -> Iterator[type[Model]]:
    for each in parent.__subclasses__():
        yield each
        yield from _models(each)


@on_the_loop_of_the_module
async def test_a_deletion_meets_a_change_that_comes_first(world: World, shared_database_url: str) -> None:
    """Conventions, concurrency: whoever names the version that was read deletes nothing that has changed since."""
    rival = Rival(shared_database_url)
    faults: list[str] = []
    for operation in deletions(world):
        kind = of(operation)
        names = await kind.make(world, world.owner)
        ids = [names[each] for each in re.findall(r"\{([a-z_]+)\}", operation.path)]
        table, key, id, column, version = await world.kit.work(functools.partial(find_row, ids), read=True)
        also = ", revision = 'changed'" if table == "llm_providers" else ""  # by which processes see the change
        change = f"UPDATE {table} SET {column} = {column} + 1{also} WHERE {key} = %s"
        client = world.admin if kind.kind in ("admin", "managed", "account") else world.owner
        path, _ = asked(operation, names)
        deletion = client.request("DELETE", path, headers={"If-Match": f'"{version}"'})
        answer = await rival.before(deletion, change, id)
        if answer.status not in (409, 412):
            faults.append(f"{operation.label} answers {answer}")
    rival.close()
    assert len(deletions(world)) > 5
    assert not faults, "\n".join(faults)
