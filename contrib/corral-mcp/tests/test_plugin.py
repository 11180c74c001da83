"""The plugin keeps the contract of plugins."""

from __future__ import annotations

from corral_mcp.plugin import McpPlugin

from corral.testing.conformance import check_plugin


def test_the_contract_is_kept() -> None:
    report = check_plugin(McpPlugin)
    assert report.ok, report
