"""The service `Tools`: one door for other plugins to what the parts of this one do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from corral.auth.principal import Principal
from corral_plugins.tools.api import ClaimTool, Json
from corral_plugins.tools.service.catalogue import Catalogue
from corral_plugins.tools.service.records import Records
from corral_plugins.tools.service.registry import Registry


class ToolsService:
    """Implements `corral_plugins.tools.api.Tools`."""

    def __init__(self, registry: Registry, catalogue: Catalogue, records: Records) -> None:
        self._registry, self._catalogue, self._records = registry, catalogue, records

    def offered(
        self, *, enabled: Sequence[str], policy: Mapping[str, Any], allowed: Sequence[str] | None, worker_id: str
    ) -> list[ClaimTool]:
        return self._catalogue.offered(enabled=enabled, policy=policy, allowed=allowed, worker_id=worker_id)

    def of_server(self) -> frozenset[str]:
        return frozenset(name for name, (tool, _) in self._registry.contributed().items() if tool.runs == "server")

    def refuse_beyond(
        self, by: Principal, *, enabled: Sequence[str], policy: Mapping[str, Any], before: Mapping[str, Any]
    ) -> None:
        self._catalogue.refuse_beyond(by, enabled=enabled, policy=policy, before=before)

    def answered(self, task_id: str, call_id: str, *, result: Any = None, error: Json | None = None) -> None:
        self._records.answered(task_id, call_id, result=result, error=error)
