"""The migration creates the tables that the models describe, and the metrics read them."""

from __future__ import annotations

from playhouse.schema_diff import diff_models
from tests.plugins.messages.conftest import Post

from corral_plugins.messages.service.metrics import count_undelivered


async def test_models_and_migration_agree_and_metrics_count(post: Post) -> None:
    models = post.kit.loaded("messages").contributions_to("corral_models")

    def differences() -> str:
        return str(diff_models(post.kit.kernel.database.engine, models))

    assert await post.kit.work(differences) == ""
    await post.send(post.agent_id)
    await post.send(channel="empty")
    assert await post.kit.work(count_undelivered, read=True) == {(): 1.0}
