"""Tools as people, agents and claims see them, and what admins change of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from msgspec import UNSET

from corral import clock
from corral.auth.principal import Principal
from corral.errors import Conflict, Forbidden, Invalid, NotFound
from corral.http.answers import IfMatch
from corral.http.page import Page, paginate_names
from corral.plugin import Audit, AuditEntry
from corral.schema.data import json_schema_problems
from corral_plugins.agents.api import AgentFacts, Agents
from corral_plugins.tools.api import RISKS, ClaimTool, Policy
from corral_plugins.tools.models import ToolRow
from corral_plugins.tools.service.decision import RISK_PERMISSION, names_it, rule_of
from corral_plugins.tools.service.opinions import NO_CONFIG
from corral_plugins.tools.service.registry import Known, Registry
from corral_plugins.tools.shapes import ToolPatch, ToolQuery, ToolView
from corral_plugins.workers.api import Workers


class Catalogue:
    """Joins the caller's unit."""

    agents: Agents | None
    audit: Audit | None
    workers: Workers | None

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    # -- reading

    def page(self, query: ToolQuery, by: Principal) -> Page[ToolView]:
        """Tools by name."""
        agent = self._agent(query.agent_id)
        found = [
            known
            for known in self._registry.all()
            if (query.risk is UNSET or known.risk in query.risk)
            and query.source in (UNSET, known.source)
            and query.runs in (UNSET, known.tool.runs)
        ]
        return paginate_names(
            found,
            query,
            by,
            scope="tools",
            name=lambda known: known.tool.name,
            make=lambda shown: [view(known, agent) for known in shown],
        )

    def one(self, name: str, agent_id: Any = UNSET) -> ToolView:
        """A tool; `NotFound`."""
        return view(self._found(name), self._agent(agent_id))

    def offered(
        self, *, enabled: Sequence[str], policy: Mapping[str, Any], allowed: Sequence[str] | None, worker_id: str
    ) -> list[ClaimTool]:
        """See `Tools.offered`."""
        worker = self.workers.facts(worker_id) if self.workers is not None else None
        has_all = worker is not None and not worker.tools
        found = []
        for known in self._registry.all(worker_id=worker_id):
            if not known.changes.enabled or not names_it(enabled, known.name):
                continue
            if allowed is not None and not names_it(allowed, known.name):
                continue
            if known.tool.runs == "worker" and not has_all and not known.workers:
                continue
            effective = rule_of(policy, known.name).policy or known.default_policy
            if effective != "deny":
                found.append(_for_claim(known, effective))
        return found

    # -- changing

    def change(self, name: str, patch: ToolPatch, match: IfMatch, *, by: Principal) -> ToolView:
        """What is given changes; `null` goes back to what the tool itself says."""
        known = self._found(name)
        before = known.changes
        match.check(before.version)
        given = {field: value for field in patch.__struct_fields__ if (value := getattr(patch, field)) is not UNSET}
        if not given:
            return view(known, None)
        self._check(known, patch)
        values = {**given, "version": before.version + 1, "updated_at": clock.now(), "updated_by": by.user_id}
        if before.version == 1:
            ToolRow.insert(name=name, **values).on_conflict_ignore().execute()
            mine = (ToolRow.updated_at == values["updated_at"]) & (ToolRow.updated_by == by.user_id)
            changed = ToolRow.select().where((ToolRow.name == name) & mine).exists()
        else:
            same = (ToolRow.name == name) & (ToolRow.version == before.version)
            changed = bool(ToolRow.update(values).where(same).execute())
        if not changed:
            raise Conflict("The tool was changed by someone else meanwhile; read it again.", current_status="changed")
        if self.audit is not None:
            changes = {field: (getattr(before, field), value) for field, value in given.items()}
            entry = AuditEntry(action="tools.tool.update", object_type="tool", object_id=name, changes=changes)
            self.audit.record(entry)
        return view(self._found(name), None)

    @staticmethod
    def _check(known: Known, patch: ToolPatch) -> None:
        is_lowered = isinstance(patch.risk, str) and RISKS.index(patch.risk) < RISKS.index(known.tool.risk)
        if is_lowered and known.source != "worker":
            told = f"The risk of this tool is {known.tool.risk} and can only be raised."
            raise Invalid.at("/risk", "not_allowed", told)
        if isinstance(patch.config, dict):
            schema = known.tool.config_schema or NO_CONFIG
            faults = json_schema_problems(schema, patch.config, pointer_prefix="/config")
            if faults:
                raise Invalid(f"{len(faults)} places do not fit the tool's configuration.", errors=faults)

    # -- what people may give to agents

    def refuse_beyond(
        self, by: Principal, *, enabled: Sequence[str], policy: Mapping[str, Any], before: Mapping[str, Any]
    ) -> None:
        """See `Tools.refuse_beyond`."""
        tools = self._registry.all()
        for name in enabled:
            for known in tools:
                if names_it([name], known.name) and not _needs(known) <= by.permissions:
                    lacking = ", ".join(sorted(_needs(known) - by.permissions))
                    raise Forbidden(f"You cannot give an agent {known.name}: you lack {lacking}.")
        if by.may("agents.manage"):
            return
        for name, rule in policy.items():
            if (
                rule != before.get(name)
                and rule_of({name: rule}, name).policy == "allow"
                and _is_dangerous(tools, name)
            ):
                raise Forbidden(f"allow for the dangerous tool {name} needs the permission agents.manage.")

    def _found(self, name: str) -> Known:
        known = self._registry.find(name)
        if known is None:
            raise NotFound("There is no tool with this name.")
        return known

    def _agent(self, agent_id: Any) -> AgentFacts | None:
        if not isinstance(agent_id, str):
            return None
        agent = self.agents.facts(agent_id.lower()) if self.agents is not None else None
        if agent is None:
            told = "There is no such agent."
            raise Invalid.at("/query/agent_id", "unknown_reference", told, problem="unknown_reference")
        return agent


def _needs(known: Known) -> frozenset[str]:
    """The permissions of who uses the tool."""
    risk = RISK_PERMISSION.get(known.risk)
    return frozenset(name for name in (risk, known.tool.permission) if name is not None)


def _is_dangerous(tools: Sequence[Known], name: str) -> bool:
    """Whether a name or `prefix.*` reaches a dangerous tool; what nobody knows yet may be one."""
    reached = [known for known in tools if names_it([name], known.name)]
    return not reached or any(known.risk == "dangerous" for known in reached)


def _for_claim(known: Known, policy: Policy) -> ClaimTool:
    tool = known.tool
    return ClaimTool(
        name=tool.name,
        title=tool.title,
        description=tool.description,
        schema=tool.schema,
        risk=known.risk,
        runs=tool.runs,
        policy=policy,
    )


def view(known: Known, agent: AgentFacts | None) -> ToolView:
    """A tool as clients see it, with the policy that holds for an agent whose run is not tainted."""
    tool, policy = known.tool, None
    if agent is not None:
        is_usable = known.changes.enabled and names_it(agent.enabled_tools, tool.name)
        policy = (rule_of(agent.tool_policy, tool.name).policy or known.default_policy) if is_usable else "deny"
    return ToolView(
        name=tool.name,
        version=known.changes.version,
        title=tool.title,
        description=tool.description,
        risk=known.risk,
        runs=tool.runs,
        schema=tool.schema,
        output_schema=tool.output_schema,
        default_policy=known.default_policy,
        enabled=known.changes.enabled,
        source=known.source,
        untrusted_output=tool.untrusted_output,
        idempotent=tool.idempotent,
        timeout_seconds=known.timeout_seconds,
        config=dict(known.config),
        config_schema=tool.config_schema,
        definition_sha256=known.definition_sha256,
        policy=policy,
        workers=list(known.workers),
    )
