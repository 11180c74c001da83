"""Explains why a task is or is not running, by testing the same conditions as a claim."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from corral import clock
from corral.auth.principal import Principal
from corral.errors import NotFound
from corral_core.accounts.api import Accounts
from corral_plugins.admin.api import KillSwitch
from corral_plugins.agents.api import AgentFacts, Agents
from corral_plugins.cost.api import format_micro_usd
from corral_plugins.llm.api import AgentModel
from corral_plugins.tasks.models import TERMINAL, Attempt, Dependency, Task, TaskRow
from corral_plugins.tasks.service import claims, rows
from corral_plugins.tasks.service.agent_models import AgentModels
from corral_plugins.tasks.service.claim_budgets import BudgetObstacle, ClaimBudgets, cost_limit_of
from corral_plugins.tasks.service.missing_tools import find_missing_tools, matches_selector
from corral_plugins.tasks.service.queries import ATTEMPT_VIEW_COLUMNS, attempt_view
from corral_plugins.tasks.service.rows import find_readable_task
from corral_plugins.tasks.shapes import AttemptView, Condition, Explanation
from corral_plugins.tools.api import Tools, includes_tools, missing_tools
from corral_plugins.workers.api import WorkerFacts, Workers

ATTEMPTS = 100
MAX_CANDIDATES = 20
SET_PRICE = (
    "Ask an admin to set one: corral api POST /cost/prices -f provider=NAME -f model=MODEL -f input_usd:=USD "
    "-f output_usd:=USD"
)
BUDGETS = (("global", "installation"), ("agent", "agent"), ("task", "task"))


class TaskExplanations:
    """Explains why tasks are or are not running. Every method runs in the caller's unit of work."""

    switch: KillSwitch | None
    tools: Tools | None

    def __init__(
        self, agents: Agents, models: AgentModels, budgets: ClaimBudgets, workers: Workers, accounts: Accounts
    ) -> None:
        self._agents, self._models, self._workers, self._accounts = agents, models, workers, accounts
        self._budgets = budgets

    def explain(self, task_id: str, caller: Principal) -> Explanation:
        """Return the conditions for claiming the task, and whether each of them is met.

        The field `claimable` of the result is true if a claim would lease the task now.
        """
        row = find_readable_task(task_id, caller)
        attempts = self._latest_attempts(row.id)
        conditions, claimable = [], False
        if row.status in TERMINAL:
            summary, conditions = _describe_end(row, attempts), self._limit_conditions(row)
        elif row.lease_id is not None:
            summary = self._describe_run(row, attempts)
        else:
            conditions = self._conditions(row)
            false = [each for each in conditions if not each.ok]
            claimable = not false
            summary = " ".join(each.detail for each in false[:3]) or "The next free worker will claim the task."
        return Explanation(
            status=row.status,
            claimable=claimable,
            summary=summary,
            conditions=conditions,
            warnings=self._warnings(row, attempts),
            attempts=attempts,
        )

    def _describe_run(self, row: TaskRow, attempts: Sequence[AttemptView]) -> str:
        worker = self._workers.find(row.worker_id) if row.worker_id is not None else None
        where = worker.name if worker is not None else row.worker_id
        return (
            f"The task is {row.status}: claim {attempts[-1].fence} on worker {where}."
            if attempts
            else "A worker holds the lease of the task."
        )

    def _warnings(self, row: TaskRow, attempts: Sequence[AttemptView]) -> list[str]:
        """Return a warning if the cost limit is too low for any model call, and one for each tool that a worker lacks.

        If the task is waiting for a claim, the agent's tools are compared with those of the workers that may claim the
        task. Otherwise, they are compared with those of the worker of the latest attempt.
        """
        is_queued = row.lease_id is None and row.status not in TERMINAL
        latest = None if is_queued or not attempts else attempts[-1]
        agent_id = row.agent_id if latest is None else latest.agent_id
        agent = self._agents.find(agent_id) if agent_id is not None else None
        if agent is None or (latest is None and not is_queued):
            return []
        found = find_missing_tools(
            agent,
            self._workers,
            self.tools,
            required=rows.parse_json_text(row.required_tools),
            worker_id=latest.worker_id if latest is not None else None,
        )
        nowhere = self.tools.unavailable_tools(found) if self.tools is not None and found else ()
        return self._limit_warnings(row, agent) + [
            f"The agent may use {tool}, but no active plugin and no online worker offers it. To see all tools: "
            "corral tools list"
            if tool in nowhere
            else f"The agent may use {tool}, but the worker {', '.join(names[:3])} does not offer it. To give tasks "
            f"only to workers that offer the tool, require it: corral run --require-tool {tool}"
            for tool, names in found.items()
        ]

    def _limit_warnings(self, row: TaskRow, agent: AgentFacts) -> list[str]:
        limit = cost_limit_of(row, agent) if row.status not in TERMINAL else None
        least = self._budgets.least_call_cost(row, agent) if limit is not None else 0
        if limit is None or least <= limit.left_micro:
            return []
        how = f"corral agents edit {shlex.quote(agent.name)} -f max_cost_per_task_usd:=USD"
        if row.get("max_cost_usd") is not None:
            how = f"corral api PATCH /tasks/{row.id} -f max_cost_usd:=USD"
        return [
            f"The cost limit of the task leaves {format_micro_usd(limit.left_micro)}, but the smallest call to its "
            f"model costs {format_micro_usd(least)}, so the task will fail. Raise it: {how}"
        ]

    @staticmethod
    def _latest_attempts(task_id: str) -> list[AttemptView]:
        found = (
            Attempt.select(*ATTEMPT_VIEW_COLUMNS)
            .where(Attempt.task_id == task_id)
            .order_by(Attempt.fence.desc())
            .limit(ATTEMPTS)
        )
        return [attempt_view(each) for each in found][::-1]

    def _conditions(self, row: TaskRow) -> list[Condition]:
        agent = self._agents.find(row.agent_id) if row.agent_id is not None else None
        fleet = self._workers.online_workers()
        found = [
            _dependency_condition(row),
            _availability_condition(row),
            self._requester_condition(row),
            self._kill_switch_condition(),
        ]
        if row.waiting_kind is not None:
            message = f"The task is waiting for {row.waiting_kind}."
            waits_for = (row.get("waiting_for") or {}).get("id")
            how = f"Answer it: corral tasks answer {row.id} ANSWER"
            if row.waiting_kind == "approval":
                how = f"Decide it: corral approvals show {waits_for}"
            found.append(_unmet("waiting_for", message, how, f"/tasks/{row.id}/{row.waiting_kind}"))
        candidates, about = self._agent_conditions(row, agent, fleet)
        found += about
        found += self._budget_conditions(row, candidates)
        found += self._worker_conditions(row, agent, candidates, fleet)
        return found

    def _requester_condition(self, row: TaskRow) -> Condition:
        try:
            is_active = row.created_by is None or self._accounts.get(row.created_by).is_active
        except NotFound:
            is_active = False
        if is_active:
            return _met("requester_active", "The requester of the task is active.")
        return _unmet(
            "requester_active",
            "The requester of the task is deactivated.",
            "Ask an admin to activate the account: corral user activate EMAIL",
            f"/admin/users/{row.created_by}",
        )

    def _kill_switch_condition(self) -> Condition:
        state = self.switch.state() if self.switch is not None else None
        if state is None or not state.engaged:
            return _met("kill_switch", "The kill switch is released.")
        message = f"The kill switch is engaged ({state.reason})."
        return _unmet(
            "kill_switch", message, "Ask an admin to release it: corral kill-switch off", "/admin/kill-switch"
        )

    def _limit_conditions(self, row: TaskRow) -> list[Condition]:
        """Return the unmet condition of a task that failed because of its cost limit, or an empty list for other tasks.

        The condition remains unmet until the limit is raised, because a retry keeps the same limit.
        """
        error, agent_id = row.get("error") or {}, row.assigned_agent_id or row.agent_id
        agent = self._agents.find(agent_id) if error.get("kind") == "budget" and agent_id is not None else None
        limit = cost_limit_of(row, agent) if agent is not None else None
        if agent is None or limit is None:
            return []
        cost, most = format_micro_usd(row.cost_micro), format_micro_usd(limit.limit_micro)
        detail = f"The task has cost {cost}, and its cost limit of {most} did not allow another model call."
        letter_id = row.get("dead_letter_id")
        if row.get("max_cost_usd") is None:
            how = f"Raise it: corral agents edit {shlex.quote(agent.name)} -f max_cost_per_task_usd:=USD, then"
            return [_unmet("budget_task", detail, f"{how} corral tasks retry {row.id}", f"/agents/{agent.id}")]
        if letter_id is None:
            how = f"Retry it, then raise its limit: corral api PATCH /tasks/{row.id} -f max_cost_usd:=USD"
            return [_unmet("budget_task", detail, how, f"/tasks/{row.id}")]
        how = f"Ask an admin to retry it with another limit: corral dead-letter retry {letter_id} -f max_cost_usd:=USD"
        return [_unmet("budget_task", detail, how, f"/dead-letter/{letter_id}")]

    # -- agents

    def _agent_conditions(
        self, row: TaskRow, agent: AgentFacts | None, fleet: Sequence[WorkerFacts]
    ) -> tuple[list[AgentFacts], list[Condition]]:
        """Return the agents that may run the task, and all conditions that concern agents, whether met or not."""
        if row.agent_id is not None:
            if agent is None:
                return [], [
                    _unmet(
                        "agent_exists",
                        "The agent of the task no longer exists.",
                        f"Name another agent: corral api PATCH /tasks/{row.id} -f agent_id=ID",
                        f"/tasks/{row.id}",
                    )
                ]
            return [agent], [
                _met("agent_exists", f"The agent of the task is {agent.name}."),
                *self._assigned_agent_conditions(row, agent),
            ]
        if row.agent_role is not None and not self._agents.has_role(row.agent_role):
            how = f"Create one: corral agents create NAME -f role={row.agent_role} --start"
            return [], [_unmet("agent_exists", f"No agent has the role {row.agent_role}.", how, "/agents")]
        started = self._agents.started_agents(row.agent_role)
        if not started:
            who = f"agent of role {row.agent_role}" if row.agent_role is not None else "agent"
            return [], [
                _unmet("agent_started", f"No {who} is started.", "Start one: corral agents start NAME", "/agents")
            ]
        tools = rows.parse_json_text(row.required_tools)
        able = [each for each in started if includes_tools(each.enabled_tools, tools)]
        if not able:
            return [], [_tools_unmet(tools, "None of the started agents may use", "NAME", tools, "/agents")]
        served = self._models.with_callable_model(able).agents
        if not served:
            return [], [self._no_model(able)]
        fitting = [each for each in served if any(matches_selector(each, worker) for worker in fleet)] or served
        free = [each for each in fitting if each.active_tasks < each.max_concurrent_tasks]
        if not free:
            message = "Every agent that could run the task has reached its maximum number of tasks."
            return fitting, [_unmet("agent_capacity", message, _concurrency_remedy("NAME"), "/agents")]
        return free, []

    def _assigned_agent_conditions(self, row: TaskRow, agent: AgentFacts) -> list[Condition]:
        href, name = f"/agents/{agent.id}", shlex.quote(agent.name)
        tools = missing_tools(agent.enabled_tools, rows.parse_json_text(row.required_tools))
        found = []
        if agent.status in ("offline", "error", "draining"):
            how = f"Start it: corral agents start {name}"
            detail = f"The agent is {agent.status}."
            if agent.status == "error":
                detail = (
                    "The agent is in the state error: its tasks failed in a row, because its configuration is wrong."
                )
            found.append(_unmet("agent_started", detail, how, f"{href}/start"))
        else:
            found.append(_met("agent_started", "The agent is started."))
        if agent.status == "paused":
            found.append(_paused_unmet(agent, name))
        else:
            found.append(_met("agent_paused", "The agent is not paused."))
        if agent.can_claim and agent.active_tasks >= agent.max_concurrent_tasks:
            message = f"The agent runs {agent.active_tasks} of at most {agent.max_concurrent_tasks} tasks."
            found.append(_unmet("agent_capacity", message, _concurrency_remedy(name), href))
        else:
            found.append(_met("agent_capacity", "The agent has a free slot."))
        found.append(
            _tools_unmet(tools, "The agent may not use", name, [*agent.enabled_tools, *tools], href)
            if tools
            else _met("tools_enabled", "The agent may use the required tools.")
        )
        found.append(self._provider_condition(agent))
        found.append(self._circuit_condition(agent))
        return found

    def _no_model(self, agents: Sequence[AgentFacts]) -> Condition:
        """Return the unmet condition that applies if all models of these agents are unavailable."""
        blocked = [model for each in agents if (model := self._models.blocked_model(each)) is not None]
        if not blocked:
            return self._provider_condition(agents[0])
        return self._circuit_unmet(blocked[0])

    def _circuit_unmet(self, model: AgentModel) -> Condition:
        block = self._models.describe_block(model)
        return _unmet("circuit", block.detail, block.remedy, f"/circuit-breakers/{block.breaker}")

    def _circuit_condition(self, agent: AgentFacts) -> Condition:
        blocked = self._models.blocked_model(agent)
        if blocked is None:
            return _met("circuit", "No open circuit breaker stops the calls to the model.")
        return self._circuit_unmet(blocked)

    def _provider_condition(self, agent: AgentFacts) -> Condition:
        unusable = self._models.unusable_model(agent)
        if unusable is None:
            name = self._models.model_name(agent)
            return _met("provider_configured", f"The provider of the model {name} is configured.")
        return _provider_unmet(agent, unusable)

    def _budget_conditions(self, row: TaskRow, candidates: Sequence[AgentFacts]) -> list[Condition]:
        """Return the conditions, met or unmet, for the budgets of the agents that may run the task.

        The conditions are met if the budgets allow an attempt by at least one of these agents.
        """
        found = [(agent, self._budgets.plan().find_obstacle(row, agent)) for agent in candidates[:MAX_CANDIDATES]]
        refused = [(agent, obstacle) for agent, obstacle in found if obstacle is not None]
        if not refused or len(refused) < len(found):
            return [_met(f"budget_{scope}", f"The budget of the {what} allows a run.") for scope, what in BUDGETS]
        return [_budget_unmet(row, *refused[0])]

    # -- workers

    def _worker_conditions(
        self, row: TaskRow, agent: AgentFacts | None, candidates: Sequence[AgentFacts], fleet: Sequence[WorkerFacts]
    ) -> list[Condition]:
        """Return the conditions that concern workers, up to and including the first condition that no worker meets.

        The conditions are checked in this order: approved, online, selector, tools, capacity.
        """
        if agent is not None and agent.worker_id is not None:
            bound = self._workers.find(agent.worker_id)
            if bound is None or not bound.is_approved:
                message = f"The worker of the agent {'is not approved' if bound else 'does not exist'}."
                return [
                    _unmet(
                        "worker_approved",
                        message,
                        f"Approve it: corral workers approve {agent.worker_id}",
                        f"/admin/workers/{agent.worker_id}/approve",
                    )
                ]
            fleet = [worker for worker in fleet if worker.id == bound.id]
        if not fleet:
            draining = self._draining_unmet("worker_online", "no other worker is online", candidates)
            return [draining] if draining is not None else self._no_worker_conditions()
        found = [_met("worker_approved", "A worker is approved."), _met("worker_online", "A worker is online.")]
        return found + self._online_worker_conditions(row, candidates, fleet)

    def _online_worker_conditions(
        self, row: TaskRow, candidates: Sequence[AgentFacts], fleet: Sequence[WorkerFacts]
    ) -> list[Condition]:
        href, tools = "/admin/workers", rows.parse_json_text(row.required_tools)
        chosen = [
            worker for worker in fleet if not candidates or any(matches_selector(each, worker) for each in candidates)
        ]
        if not chosen:
            others = "no online worker matches the agent's selector"
            draining = self._draining_unmet("worker_selector", others, candidates)
            return [draining or _selector_unmet(candidates[0], href)]
        found = [_met("worker_selector", "A worker matches the agent's selector.")]
        of_server = self.tools.server_tools() if self.tools is not None else frozenset()
        able = [worker for worker in chosen if claims.worker_has_tools(worker, tools, of_server)]
        if not able:
            message = f"No online worker offers {', '.join(tools)}."
            return [
                *found,
                _unmet("worker_tools", message, f"Start one: corral worker --allow {' --allow '.join(tools)}", href),
            ]
        found.append(_met("worker_tools", "A worker offers the required tools."))
        if any(worker.active_leases < worker.max_agents and worker.can_claim for worker in able):
            return [*found, _met("worker_capacity", "A worker has a free slot.")]
        message = "Every worker that could run the task is full."
        return [*found, _unmet("worker_capacity", message, "Wait, or add a worker: corral worker --url URL", href)]

    def _draining_unmet(self, code: str, others: str, candidates: Sequence[AgentFacts]) -> Condition | None:
        """Return the unmet condition if a worker that one of the agents could use is draining, otherwise None."""
        for worker in self._workers.draining_workers():
            if not candidates or any(matches_selector(each, worker) for each in candidates):
                how = f"Resume it: corral workers drain --resume {shlex.quote(worker.name)}"
                href = f"/admin/workers/{worker.id}/resume"
                return _unmet(code, f"The worker {worker.name} is draining, and {others}.", how, href)
        return None

    def _no_worker_conditions(self) -> list[Condition]:
        """Return the unmet condition that applies if no approved worker is online.

        Either no worker is online at all, or a registered worker is waiting for approval.
        """
        if self._workers.awaits_first_approval():
            message, how = "A worker has registered, but none is approved.", "Approve it: corral workers approve NAME"
            return [_unmet("worker_approved", message, how, "/admin/workers")]
        how = "Start one: corral worker --url URL"
        return [_unmet("worker_online", "No worker is online.", how, "/admin/workers")]


def _dependency_condition(row: TaskRow) -> Condition:
    found = (
        Task.select(Task.id, Task.status)
        .join(Dependency, on=(Task.id == Dependency.needs_id))
        .where((Dependency.task_id == row.id) & (Task.status != "completed"))
        .limit(5)
    )
    waited_for = rows.fetch_tuples(found) if row.status == "blocked" else []
    if not waited_for:
        return _met("dependencies", "The task waits for no other task.")
    names = ", ".join(f"{task_id} ({status})" for task_id, status in waited_for)
    return _unmet(
        "dependencies",
        f"The task waits for {names}.",
        f"See why it waits: corral tasks explain {waited_for[0][0]}",
        f"/tasks/{row.id}",
    )


def _availability_condition(row: TaskRow) -> Condition:
    if row.status != "pending" or row.available_at <= clock.now():
        return _met("available_at", "The task is available.")
    error = row.get("error")
    why = f" after {error['type']}" if error else ""
    return _unmet("available_at", f"The task is not available before {row.available_at}{why}.", "Wait.", None)


def _tools_unmet(tools: Sequence[str], who: str, agent: str, enabled: Sequence[str], href: str) -> Condition:
    how = f"Enable the tools: corral agents edit {agent} {' '.join(f'--tool {shlex.quote(each)}' for each in enabled)}"
    return _unmet("tools_enabled", f"{who} {', '.join(tools)}.", how, href)


def _selector_unmet(agent: AgentFacts, href: str) -> Condition:
    detail = f"No online worker matches the selector of the agent {agent.name}."
    how = f"Change it: corral agents edit {shlex.quote(agent.name)} -f worker_selector:=JSON"
    return _unmet("worker_selector", detail, how, href)


def _paused_unmet(agent: AgentFacts, name: str) -> Condition:
    """Return the unmet condition for a paused agent. `name` is the agent's name, quoted for the shell."""
    href = f"/agents/{agent.id}"
    if agent.status_reason == "budget":  # nobody resumes it before the budget leaves something
        detail = f"The agent is paused, because the budget of the agent {agent.name} is used up."
        raising = f"Raise it: corral agents edit {name} -f monthly_budget_usd:=USD"
        how = f"{raising}, or ask an admin to start the agent anyway: corral agents start {name} --override"
        return _unmet("agent_paused", detail, how, f"{href}/budget")
    why = {"manual": "", "stalled": ", because its tasks stalled"}.get(agent.status_reason or "manual")
    detail = f"The agent is paused{f' ({agent.status_reason})' if why is None else why}."
    return _unmet("agent_paused", detail, f"Resume it: corral agents resume {name}", f"{href}/resume")


def _concurrency_remedy(agent: str) -> str:
    return f"Wait, or allow more tasks at a time: corral agents edit {agent} -f max_concurrent_tasks:=N"


def _provider_unmet(agent: AgentFacts, model: AgentModel) -> Condition:
    other_model = f"another model: corral agents edit {shlex.quote(agent.name)} --model PROVIDER/MODEL"
    unblock = f"Choose {other_model}" if model.remedy is None else f"{model.remedy}, or choose {other_model}"
    lists = "corral api GET /llm/models lists them"
    return _unmet("provider_configured", model.problem or "", f"{unblock} ({lists}).", "/llm/providers")


def _budget_unmet(row: TaskRow, agent: AgentFacts, obstacle: BudgetObstacle) -> Condition:
    """Return the unmet condition for a budget, with the amounts and the command that raises the limit sufficiently."""
    scope, limit = obstacle.scope, format_micro_usd(obstacle.limit)
    code, enough = f"budget_{scope}", _amount(obstacle.limit + obstacle.needed - obstacle.left)
    if obstacle.detail is not None:
        return _unmet(code, obstacle.detail, SET_PRICE, "/cost/prices")
    if scope == "task":
        detail = f"The task has cost {format_micro_usd(row.cost_micro)}, and its cost limit is {limit}."
        how = f"Raise it: corral api PATCH /tasks/{row.id} -f max_cost_usd:=USD"
        return _unmet(code, detail, how, f"/tasks/{row.id}")
    what = "the next model call may cost" if obstacle.is_known_call else "a run is expected to cost"
    amounts = f"{format_micro_usd(obstacle.left)} of {limit} left, but {what} {format_micro_usd(obstacle.needed)}."
    if scope == "agent":
        how = f"Raise it: corral agents edit {shlex.quote(agent.name)} -f monthly_budget_usd:={enough}"
        return _unmet(code, f"The budget of the agent {agent.name} has {amounts}", how, f"/agents/{agent.id}/budget")
    how = f"Ask an admin to raise it: corral cost budget set --limit {enough}"
    return _unmet(code, f"The budget of the installation has {amounts}", how, "/cost/budget")


def _amount(micro_usd: int) -> str:
    """Return an amount in US dollars without the dollar sign, for use in commands."""
    return format_micro_usd(micro_usd).removeprefix("$")


def _met(code: str, detail: str) -> Condition:
    return Condition(code=code, ok=True, detail=detail)


def _unmet(code: str, detail: str, unblock: str, href: str | None) -> Condition:
    return Condition(code=code, ok=False, detail=detail, unblock=unblock, href=f"/api/v1{href}" if href else None)


def _describe_end(row: TaskRow, attempts: Sequence[AttemptView]) -> str:
    times = f"{row.fence} claim{'' if row.fence == 1 else 's'} by workers"  # retries by hand begin the attempts anew
    if row.status == "completed":
        return f"Completed after {times}."
    if row.status == "cancelled":
        reason = (row.get("cancel_reason") or "").removesuffix(".")
        return f"Cancelled ({row.cancel_kind or 'user'}){f': {reason}' if reason else ''}."
    error = row.get("error") or {}
    return f"Failed after {times}: {error.get('type')}: {error.get('message')}"
