"""What is added to Quart beside the declared routes: served with them, and refused where it is added."""

from __future__ import annotations

from typing import Any

import pytest
from quart import Blueprint

from corral.testing.kit import Kit

pytestmark = pytest.mark.one_engine


async def hello(number: int = 0) -> str:
    return f"hello {number}"


async def test_a_blueprint_is_served_beside_the_declared_routes(kit: Kit) -> None:
    beside = Blueprint("beside", __name__)
    beside.add_url_rule("/beside/<int:number>", view_func=hello)
    kit.application.app.register_blueprint(beside)
    answer = await kit.client.get("/beside/7", root=True)
    assert (answer.status, answer.body) == (200, b"hello 7")
    assert (await kit.client.get("/health", root=True)).status == 200


@pytest.mark.parametrize("rule", ["/beside/<nosuch:thing>", "/beside/<thing", "beside"])
async def test_a_malformed_rule_fails_where_it_is_added(kit: Kit, rule: str) -> None:
    app: Any = kit.application.app
    with pytest.raises((LookupError, ValueError)):
        app.add_url_rule(rule, "beside", hello)
    assert (await kit.client.get("/health", root=True)).status == 200
