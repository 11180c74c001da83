"""The response to a keyed request of a task that ends meanwhile. Only PostgreSQL runs units at the same time."""

from __future__ import annotations

from tests.engines import POSTGRES
from tests.rival import Rival

from corral import clock
from corral.http.answers import Response
from corral.http.idempotency import KEEP_SECONDS, Idempotency, IdempotencyKey, IdempotencyRow
from corral.ids import new_id
from corral.testing.kit import Kit

pytestmark = POSTGRES


async def test_a_response_is_kept_for_a_day_if_its_task_ends_meanwhile(kit: Kit, database_url: str) -> None:
    idempotency, task_id = Idempotency(kit.kernel.keyring), new_id()
    key = IdempotencyKey.of_request("key", "agent", "POST", "/files", b"", task_id)
    await kit.work(lambda: idempotency.claim_key(key))
    response = Response(201, b"{}", {}, "application/json")
    rival = Rival(database_url)
    end = "UPDATE kernel_idempotency SET until = %s, task_id = NULL WHERE task_id = %s"
    done = kit.work(lambda: idempotency.store_response(key, response, b"{}", secret=False))
    await rival.before(done, end, clock.now(KEEP_SECONDS), task_id)
    rival.close()
    until = await kit.work(lambda: IdempotencyRow.get_by_id(key.scope_hash).until, read=True)
    assert until <= clock.now(KEEP_SECONDS)
