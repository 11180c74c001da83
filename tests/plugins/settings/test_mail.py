"""`POST /settings/test-mail` and the check of the mail server, with a real one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tests.kernel.mail.conftest import MailServer
from tests.plugins.settings.conftest import Shelf

from corral_core.health.service.check_runner import HealthBoard


@pytest.fixture
def mail_server() -> Iterator[MailServer]:
    server = MailServer().start()
    yield server
    server.stop()


async def named(make_shelf: Callable[..., Any], server: MailServer) -> Shelf:
    """A kernel that is told of the server at run time."""
    shelf: Shelf = await make_shelf(config={"egress.allow": server.allow()})
    values = {"mail.host": "127.0.0.1", "mail.port": server.port, "mail.security": "none", "mail.from": "c@x.example"}
    assert (await shelf.admin.put("/settings/bulk", {"settings": values})).status == 200
    return shelf


async def checked(shelf: Shelf) -> dict[str, Any]:
    """The check of the mail server, asked now."""
    board = shelf.kit.kernel.container.get(HealthBoard)
    board._asked = None
    found: dict[str, Any] = (await shelf.admin.get("/settings/health")).json()["checks"]["mail"]
    return found


@pytest.mark.one_engine
async def test_a_test_mail_tells_how_it_went(make_shelf: Callable[..., Any], mail_server: MailServer) -> None:
    shelf = await named(make_shelf, mail_server)
    answer = await shelf.admin.post("/settings/test-mail", {"to": "somebody@x.example"})
    assert (answer.status, answer.json()["delivered"], answer.json()["error"]) == (200, True, None)
    assert len(mail_server.box.to("somebody@x.example")) == 1
    assert (await checked(shelf))["status"] == "ok"
    mail_server.stop()
    failed = await shelf.admin.post("/settings/test-mail", {"to": "somebody@x.example"})
    assert (failed.status, failed.json()["delivered"]) == (200, False)
    assert failed.json()["error"]
    down = await checked(shelf)
    assert down["status"] == "down"
    assert str(mail_server.port) not in down["detail"]


@pytest.mark.one_engine
async def test_without_a_mail_service_there_is_none_to_test(shelf: Shelf) -> None:
    answer = await shelf.admin.post("/settings/test-mail", {"to": "somebody@x.example"})
    assert (answer.status, answer.code) == (409, "invalid_state")
    assert (await checked(shelf))["status"] == "disabled"
    assert (await shelf.admin.post("/settings/test-mail", {"to": 5})).status == 422
    member = await shelf.kit.as_user("member")
    assert (await member.post("/settings/test-mail", {"to": "somebody@x.example"})).code == "forbidden"
