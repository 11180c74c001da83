"""The second unit of a call: its row, its cost event, its task's tally, its place in the queue."""

from __future__ import annotations

import functools

from corral.auth.principal import Principal
from corral.database.unit import after_commit
from corral_plugins.cost.api import Cost, Spent
from corral_plugins.llm.service import calls
from corral_plugins.llm.service.outcome import Outcome
from corral_plugins.llm.service.payloads import Payloads
from corral_plugins.llm.service.plan import Plan
from corral_plugins.llm.service.seen import Seen
from corral_plugins.llm.service.slots import Slots, Ticket
from corral_plugins.llm.service.states import States
from corral_plugins.tasks.api import Tasks


class Settlement:
    """Joins the caller's unit. Of several settlements of one call the first counts."""

    tasks: Tasks | None

    def __init__(self, cost: Cost, slots: Slots, states: States, payloads: Payloads, seen: Seen) -> None:
        self._cost, self._slots, self._states = cost, slots, states
        self._payloads, self._seen = payloads, seen

    def settle(self, plan: Plan, outcome: Outcome, ticket: Ticket | None) -> bool:
        """Write how it went; whether the lease still lives. Locks are taken in the order task, prices, queue."""
        self._charge(plan, outcome)
        if calls.settle(plan.call_id, outcome):
            self._payloads.keep(plan.call_id, plan.request, outcome)
            self._states.note(outcome)
            after_commit(functools.partial(self._count, outcome))
        alive = self.lease_is_live(plan.by)
        self._slots.leave(ticket)
        return alive

    def settle_least(self, plan: Plan, outcome: Outcome, ticket: Ticket | None) -> None:
        """Where `settle` fails: what was used is charged all the same, and the place is given back."""
        least = outcome.least()
        self._charge(plan, least)
        calls.settle(plan.call_id, least)
        self._slots.leave(ticket)

    def lease_is_live(self, by: Principal) -> bool:
        """Whether the caller's lease is; it is renewed. Who has none always may go on."""
        if by.lease_id is None or by.task_id is None:
            return True
        if self.tasks is None or self.tasks.live_lease(by.task_id, by.lease_id) is None:
            return False
        self.tasks.renew_one(by.task_id, by.lease_id)
        return True

    def _charge(self, plan: Plan, outcome: Outcome) -> None:
        """What a call used is paid, whatever became of its lease. A call that reached no provider used nothing."""
        if not outcome.reached:
            return
        by, target, tokens = plan.by, outcome.target, outcome.tokens
        charged = self._cost.settle(
            Spent(
                usage_key=plan.call_id,
                by_gateway=True,
                provider=target.provider.name,
                model=target.model,
                operation="embedding" if plan.kind == "embedding" else "chat",
                input_tokens=tokens.input_tokens,
                output_tokens=tokens.output_tokens,
                cache_read_tokens=tokens.cache_read_tokens,
                cache_write_tokens=tokens.cache_write_tokens,
                cost_usd=outcome.reported_cost,
                estimated=outcome.estimated,
                user_id=by.user_id,
                agent_id=by.agent_id,
                task_id=by.task_id,
                attempt_id=self._attempt_id(by),
            ),
            free=target.provider.free,
        )
        outcome.cost_micro_usd, outcome.priced = charged.cost_micro_usd, charged.priced
        if self.tasks is not None and by.task_id is not None and by.lease_id is not None and not charged.repeated:
            self.tasks.spent(
                by.task_id,
                by.lease_id,
                input_tokens=tokens.total - tokens.output_tokens,
                output_tokens=tokens.output_tokens,
                cost_usd=charged.cost_usd,
            )

    def _attempt_id(self, by: Principal) -> str | None:
        if self.tasks is None or by.task_id is None or by.lease_id is None:
            return None
        facts = self.tasks.lease_facts(by.task_id, by.lease_id)
        return facts.attempt_id if facts is not None else None

    def _count(self, outcome: Outcome) -> None:
        tokens = outcome.tokens
        counted = (tokens.input_tokens, tokens.output_tokens, tokens.cache_read_tokens, tokens.cache_write_tokens)
        name = outcome.target.provider.name
        self._seen.ended(name, outcome.status, counted, outcome.cost_micro_usd)
        if outcome.first_token_ms is not None:
            self._seen.first_token(name, outcome.first_token_ms)
