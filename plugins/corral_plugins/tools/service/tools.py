"""The implementation of the `Tools` service, which other plugins use."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from corral.auth.principal import Principal
from corral.errors import Forbidden
from corral.redact.redactor import Redactor
from corral_plugins.tasks.api import Tasks
from corral_plugins.tools.api import (
    POLICIES,
    ClaimTool,
    Json,
    ToolPolicy,
    ToolRisk,
    includes_tools,
    unserved_tools,
)
from corral_plugins.tools.service import call_store
from corral_plugins.tools.service.call_store import truncate_output
from corral_plugins.tools.service.decision import permissions_for, rule_of
from corral_plugins.tools.service.held_calls import HeldCalls
from corral_plugins.tools.service.registry import RegisteredTool, ToolRegistry
from corral_plugins.workers.api import Workers

DEFINED = ("name", "title", "description", "schema", "runs")


class ToolsService:
    """The implementation of `corral_plugins.tools.api.Tools`."""

    tasks: Tasks | None
    workers: Workers | None

    def __init__(self, registry: ToolRegistry, redactor: Redactor, held: HeldCalls) -> None:
        self._registry, self._redactor, self._held = registry, redactor, held

    def tools_for_run(
        self, *, enabled: Sequence[str], policy: Mapping[str, Any], allowed: Sequence[str] | None, worker_id: str
    ) -> list[ClaimTool]:
        worker = self.workers.find(worker_id) if self.workers is not None else None
        found: list[ClaimTool] = []
        for tool in self._registry.list_tools(worker_id=worker_id):
            if not (tool.overrides.enabled and tool.accepted and includes_tools(enabled, [tool.name])):
                continue
            if allowed is not None and not includes_tools(allowed, [tool.name]):
                continue
            if tool.definition.runs == "worker" and (worker is None or not worker.offers(tool.name)):
                continue
            effective = rule_of(policy, tool.name).policy or tool.default_policy
            if effective != "deny":
                found.append(_claim_tool(tool, effective))
        return found

    def server_tools(self) -> frozenset[str]:
        contributed = self._registry.contributed_tools().items()
        of_plugins = (name for name, (tool, _) in contributed if tool.runs == "server")
        return frozenset((*of_plugins, *self._registry.usable_mcp_tools()))

    def unavailable_tools(self, names: Iterable[str]) -> list[str]:
        usable = [tool.name for tool in self._registry.list_tools() if tool.overrides.enabled and tool.accepted]
        return unserved_tools(names, usable, ())

    def risks(self) -> Mapping[str, ToolRisk]:
        return {tool.name: tool.risk for tool in self._registry.list_tools()}

    def refuse_missing_permissions(
        self, by: Principal, *, enabled: Sequence[str], policy: Mapping[str, Any], before: Mapping[str, Any]
    ) -> None:
        tools = self._registry.list_tools()
        for name in enabled:
            for tool in tools:
                if includes_tools([name], [tool.name]) and not permissions_for(tool) <= by.permissions:
                    missing = ", ".join(sorted(permissions_for(tool) - by.permissions))
                    raise Forbidden(
                        f"You cannot enable {tool.name} for an agent, because you do not have the permission {missing}."
                    )
        if by.may("agents.manage"):
            return
        for name, rule in policy.items():
            if (
                rule != before.get(name)
                and rule_of({name: rule}, name).policy == "allow"
                and _is_dangerous(tools, name)
            ):
                raise Forbidden(
                    f"Setting the policy of the dangerous tool {name} to `allow` requires the permission agents.manage."
                )
        for tool in tools:
            was, now = [rule_of(rules, tool.name).policy or tool.default_policy for rules in (before, policy)]
            bound = min(was, tool.default_policy, key=POLICIES.index)
            if tool.risk == "dangerous" and POLICIES.index(now) < POLICIES.index(bound):
                raise Forbidden(
                    f"Setting the policy of the dangerous tool {tool.name} to {now} (default: {tool.default_policy}) "
                    "requires the permission agents.manage."
                )

    def approval_changed(self, call_row_id: str, *, status: str, note: str | None) -> None:
        self._held.approval_changed(call_row_id, status, note)

    def results_of_held_call(self, call_row_id: str) -> list[Json] | None:
        return self._held.results_of(call_row_id)

    def target_of_held_call(self, call_row_id: str, arguments: Any, *, pointer: str) -> str | None:
        return self._held.target_of(call_row_id, arguments, pointer)

    def deliver_result(self, task_id: str, call_id: str, *, result: Any = None, error: Json | None = None) -> None:
        row = call_store.find_call(task_id, call_id)
        if row is not None and row.status == "running" and row.alive_until is None:
            status = "succeeded" if error is None else "failed"
            # A person wrote the answer: redact only stored credentials, not text that merely looks like a credential.
            redacted = truncate_output(self._redactor.redact_json(result, patterns=False))
            run = self.tasks.find_run(task_id) if self.tasks is not None else None
            causes = () if run is None else run.cause_chain
            call_store.end_call(row, status, result=redacted, error=error, causes=causes)


def _is_dangerous(tools: Sequence[RegisteredTool], name: str) -> bool:
    """Return whether a name or `prefix.*` pattern matches a dangerous tool.

    A name that matches no tool counts as dangerous, because a matching tool may be added later.
    """
    included = [tool for tool in tools if includes_tools([name], [tool.name])]
    return not included or any(tool.risk == "dangerous" for tool in included)


def _claim_tool(tool: RegisteredTool, policy: ToolPolicy) -> ClaimTool:
    defined: dict[str, Any] = {name: getattr(tool.definition, name) for name in DEFINED}
    return ClaimTool(**defined, risk=tool.risk, policy=policy)
