"""The rows that a query selects are those that a read by id would show."""

from __future__ import annotations

import itertools
from pathlib import Path

import peewee

from corral.auth.principal import Principal
from corral.auth.visibility import can_read, visible
from corral.database.connect import connect
from corral.database.model import VISIBILITIES, IdField, Model
from corral.database.unit import current


class Thing(Model):
    """An object with an owner."""

    owner_field = "owner_id"

    id = IdField(primary_key=True)
    owner_id = IdField(null=True)

    class Meta:
        table_name = "things"


def test_a_query_shows_what_a_read_shows(tmp_path: Path) -> None:
    owners = ("u1", "u2", None)
    callers = [
        Principal(kind=kind, id="c", user_id=user_id, role=role)
        for kind in ("user", "agent", "system")
        for role in ("admin", "member", "auditor", None)
        for user_id in ("u1", None)
    ]

    def shown(caller: Principal) -> set[str | None]:
        return {row.owner_id for row in Thing.select().where(visible(Thing, caller))}

    def check() -> None:
        current().database.engine.create_tables([Thing])
        Thing.insert_many([{"id": str(owner), "owner_id": owner} for owner in owners]).execute()
        for visibility, caller in itertools.product((*VISIBILITIES, "sharde"), callers):
            Thing.visibility = visibility
            assert shown(caller) == {owner for owner in owners if can_read(caller, visibility, owner)}, (
                visibility,
                caller,
            )

    database = connect(f"sqlite:///{tmp_path}/things.db")
    try:
        database.run(check)
    finally:
        database.close()


def test_an_owner_sees_a_private_and_admin_row() -> None:
    Thing.visibility = "private_and_admin"
    owner = Principal(kind="user", id="u1", user_id="u1", role="member")
    assert isinstance(visible(Thing, owner), peewee.Expression)
    assert not can_read(owner, "sharde", "u1")
