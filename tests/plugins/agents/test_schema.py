"""The migration makes the tables that the models describe; the metrics read them."""

from __future__ import annotations

from playhouse.schema_diff import diff_models

from corral.testing.kit import Kit
from corral_plugins.agents.service.states import count_by_status


async def test_models_and_migration_agree(kit: Kit) -> None:
    models = kit.loaded("agents").contributions_to("corral_models")

    def differences() -> str:
        return str(diff_models(kit.kernel.database.engine, models))

    assert await kit.kernel.database.work(differences) == ""


async def test_metrics_count_living_agents(kit: Kit) -> None:
    alice = await kit.as_user("member")
    for name in ("a", "b", "c"):
        await alice.post("/agents", {"name": name})
    agents = (await alice.get("/agents")).json()["items"]
    await alice.post(f"/agents/{agents[0]['id']}/start")
    await alice.delete(f"/agents/{agents[1]['id']}")
    counts = await kit.kernel.database.work(count_by_status, read=True)
    assert (counts[("offline",)], counts[("idle",)], counts[("busy",)]) == (1, 1, 0)
    answer = await kit.client.get("/metrics", root=True)
    if answer.status == 200:
        assert b'corral_agents{status="idle"} 1' in answer.body
