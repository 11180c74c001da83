"""The run-time setting of the `marketplace` plugin: the URL of the remote index."""

from __future__ import annotations

from typing import Any

from corral.plugin import Setting, Settings


def _is_https(value: Any, settings: Settings) -> str | None:
    return None if value is None or value.startswith("https://") else "must be an https URL"


INDEX_URL = Setting(
    name="marketplace.index_url",
    kind=str,
    default=None,
    maximum=2000,
    check=_is_https,
    own_session=True,
    title="URL of an index of further templates (null: no index)",
)
