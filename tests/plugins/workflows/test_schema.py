"""The migration makes the tables that the models describe; the metrics read them."""

from __future__ import annotations

from playhouse.schema_diff import diff_models
from tests.plugins.workflows.conftest import World, step, transform

from corral_plugins.workflows.service.metrics import count_active_runs


async def test_models_and_migration_agree(world: World) -> None:
    models = world.kit.loaded("workflows").contributions_to("corral_models")

    def differences() -> str:
        return str(diff_models(world.kit.kernel.database.engine, models))

    assert await world.kit.work(differences) == ""


async def test_metrics_count_runs_and_measure_steps(world: World) -> None:
    await world.run(transform("one", 1))
    await world.until(await world.start(await world.workflow(step("w", "wait", {"seconds": 900}))), "waiting")
    counts = await world.kit.work(count_active_runs, read=True)
    assert (counts[("waiting",)], counts[("running",)]) == (1, 0)
