"""The plugin keeps the contract of plugins: declarations, migrations, out of service and back."""

from __future__ import annotations

import pytest

from corral.testing.conformance import check_plugin
from corral_plugins.code_reviews.plugin import CodeReviewsPlugin


@pytest.mark.postgres
def test_the_plugin_keeps_the_contract(postgres_server: object) -> None:
    url = postgres_server.create_database()  # type: ignore[attr-defined]  # the session's server
    report = check_plugin(CodeReviewsPlugin, postgres_url=url)
    assert report.ok, report
