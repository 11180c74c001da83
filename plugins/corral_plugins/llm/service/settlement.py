"""Settles calls: stores the outcome of a call in its last unit of work.

The settlement writes the call's row, its cost event and the provider's state, and releases the concurrency slot.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping
from typing import Any

from corral import clock
from corral.database.unit import after_commit, before_commit
from corral.events.event import SystemAlert, emit
from corral_plugins.cost.api import BillableUsage, Costs
from corral_plugins.llm.models import LlmProviderState
from corral_plugins.llm.service import calls
from corral_plugins.llm.service.calls import CallOutcome, CallRecord, PayloadStore
from corral_plugins.llm.service.metrics import CallMetrics
from corral_plugins.llm.service.slots import ConcurrencySlots
from corral_plugins.llm.service.task_leases import CallLeases

WRITE_SECONDS = 30.0
ALERT_SECONDS = 3600.0


class ProviderStates:
    """Records successes and errors of providers, and raises alerts for rejected API keys.

    Runs in the caller's unit of work. An unchanged state is written at most once every 30 seconds, so that calls do not
    wait for each other's row locks.
    """

    def __init__(self) -> None:
        self._written: dict[tuple[str, str], float] = {}

    def record_outcome(self, outcome: CallOutcome) -> None:
        """Record the outcome of a call in the state of its provider."""
        name = outcome.target.provider.name
        if outcome.status == "failed" and outcome.attempts:
            self.record_error(name, outcome.error or {}, credentials_refused=outcome.credentials_refused)
        elif outcome.status == "completed" and self._is_due(name, "completed"):
            update_state(name, last_ok_at=clock.now(), last_error=None)

    def record_error(self, name: str, error: Mapping[str, Any], *, credentials_refused: bool) -> None:
        """Record an error from a provider, even if the call later succeeds with another provider."""
        if self._is_due(name, "failed"):
            update_state(name, last_error={**error, "at": clock.now()})
        if credentials_refused:
            self._alert_rejected_key(name, error)

    def _is_due(self, name: str, status: str) -> bool:
        if time.monotonic() - self._written.get((name, status), -WRITE_SECONDS) < WRITE_SECONDS:
            return False
        after_commit(functools.partial(self._record_write_time, name, status))
        return True

    def _record_write_time(self, name: str, status: str) -> None:
        self._written[(name, status)] = time.monotonic()
        self._written.pop((name, "failed" if status == "completed" else "completed"), None)

    @staticmethod
    def _alert_rejected_key(name: str, error: Mapping[str, Any]) -> None:
        """Alert admins about a rejected API key, at most once an hour per provider across all processes."""
        state = LlmProviderState
        is_due = state.alerted_at.is_null() | (state.alerted_at < clock.now(-ALERT_SECONDS))
        state.insert(name=name).on_conflict_ignore().execute()
        if state.update(alerted_at=clock.now()).where((state.name == name) & is_due).execute():
            alert = SystemAlert(
                kind="llm_credentials",
                severity="critical",
                title=f"The provider {name} rejects its API key",
                detail=str(error.get("detail", "")),
                object={"type": "llm_provider", "id": name},
            )
            emit(alert, object=("llm_provider", name))


def update_state(name: str, **values: Any) -> None:
    """Insert or update the state row of a provider."""
    insert = LlmProviderState.insert(name=name, **values)
    insert.on_conflict(conflict_target=[LlmProviderState.name], update=values).execute()


class CallSettlement:
    """Stores the outcomes of calls. Runs in the caller's unit of work. A stored outcome is never overwritten."""

    def __init__(
        self,
        cost: Costs,
        slots: ConcurrencySlots,
        leases: CallLeases,
        states: ProviderStates,
        payloads: PayloadStore,
        metrics: CallMetrics,
    ) -> None:
        self._cost, self._slots, self._leases = cost, slots, leases
        self._states, self._payloads, self._metrics = states, payloads, metrics

    def settle_call(self, call: CallRecord, outcome: CallOutcome) -> bool:
        """Store the outcome and the cost of a call, and release its slot. Return whether the caller's lease is live.

        Rows are locked in this order: the task, the queue of the provider, the cost counters.
        """
        self._record_cost(call, outcome)
        if calls.settle_call(call.id, outcome):
            self._payloads.store_payload(call.id, call.request, outcome)
            self._states.record_outcome(outcome)
            after_commit(functools.partial(self._metrics.add_call, outcome))
        is_live = self._leases.is_live(call.by)
        self._slots.leave_queue(call.slot)
        return is_live

    def settle_without_details(self, call: CallRecord, outcome: CallOutcome) -> None:
        """Record the cost of a call, store its outcome without details, and release its slot.

        Called if `settle_call` fails.
        """
        reduced = outcome.without_details()
        self._record_cost(call, reduced)
        calls.settle_call(call.id, reduced)
        self._slots.leave_queue(call.slot)

    def _record_cost(self, call: CallRecord, outcome: CallOutcome) -> None:
        """Record the cost of a call, even if the caller's lease has ended.

        The cost replaces the money reserved for the call. Nothing is recorded if no provider can charge for the call.
        """
        if not outcome.billable:
            self._cost.release(call.hold)
            return
        by, target, tokens = call.by, outcome.target, outcome.tokens
        lease = self._leases.lease_facts(by)
        charged = self._cost.record_cost(
            BillableUsage(
                usage_key=call.id,
                by_gateway=True,
                provider=target.provider.name,
                model=target.model,
                operation="embedding" if call.kind == "embedding" else "chat",
                input_tokens=tokens.input_tokens,
                output_tokens=tokens.output_tokens,
                cache_read_tokens=tokens.cache_read_tokens,
                cache_write_tokens=tokens.cache_write_tokens,
                cost_usd=outcome.reported_cost,
                estimated=outcome.estimated,
                user_id=by.user_id,
                agent_id=by.agent_id,
                task_id=by.task_id,
                attempt_id=None if lease is None else lease.attempt_id,
                run_id=call.run_id if lease is None else lease.workflow_run_id,
            ),
            free=target.provider.free,
            hold=call.hold,
        )
        outcome.cost_micro_usd = charged.cost_micro_usd
        self._leases.add_usage(by, tokens, charged)
        if call.hold is not None:  # last, when the budgets contain the cost and not the hold
            before_commit(functools.partial(self._read_budget_left, call, outcome))

    def _read_budget_left(self, call: CallRecord, outcome: CallOutcome) -> None:
        """Read how much is left in the budget, in micro-USD, and store the amount in the outcome.

        If several budgets apply, the smallest amount is stored. If no budget applies, the amount is None.
        """
        room = self._cost.headroom(call.by.agent_id)
        outcome.budget_left_micro_usd = min((e for e in (room.overall, room.agent) if e is not None), default=None)
