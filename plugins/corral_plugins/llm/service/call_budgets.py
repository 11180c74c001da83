"""Reserves the estimated cost of each call before the call is sent.

A call that an attempt makes under its lease uses money that is already reserved for the attempt. For any other call,
money is reserved separately. The estimate is what the call costs if it has the estimated number of input tokens and the
maximum number of output tokens.
"""

from __future__ import annotations

from corral import clock
from corral.auth.principal import Principal
from corral.plugin import Settings
from corral_plugins.cost.api import (
    FREE_PROVIDERS,
    MAX_TOKENS,
    BudgetRefused,
    Costs,
    Hold,
    NewReservation,
    TokenCounts,
)
from corral_plugins.llm.service.calls import CallRecord
from corral_plugins.llm.service.registry import ModelTarget, ProviderRegistry
from corral_plugins.llm.service.task_leases import CallLeases
from corral_plugins.llm.service.token_caps import default_cap, requested_cap
from corral_plugins.llm.settings import TOTAL_TIMEOUT_SECONDS
from corral_plugins.tasks.api import LiveAttempt

GRACE_SECONDS = 60


class CallBudgets:
    """Reserves money for calls and releases it. Every method runs in the caller's unit of work."""

    def __init__(self, settings: Settings, cost: Costs, registry: ProviderRegistry, leases: CallLeases) -> None:
        self._settings, self._cost, self._registry, self._leases = settings, cost, registry, leases

    def hold_cost(self, call: CallRecord, target: ModelTarget, attempt: LiveAttempt | None) -> Hold | None:
        """Reserve the estimated cost of sending the call to the target. Return None if no budget limits the call.

        Raise `BudgetRefused` if a budget does not allow the call. Calls that cost nothing are always allowed. `attempt`
        is the attempt to which the caller's lease belongs.
        """
        provider, agent_id = target.provider, call.by.agent_id
        if provider.free or provider.name in FREE_PROVIDERS:
            return None
        limit = call.limit_micro if attempt is None else attempt.cost_left_micro
        if limit is None and not self._cost.is_limited(agent_id):
            return None
        quote = self._cost.quote(provider.name, target.model, self._estimated_tokens(call, target))
        wanted = NewReservation(
            holder="call" if attempt is None else "attempt",
            holder_id=call.id if attempt is None else attempt.attempt_id,
            amount_micro_usd=self._cost.amount_to_reserve(quote),
            expires_at=self._expiry() if attempt is None else attempt.lease_until,
            agent_id=agent_id,
            task_id=None if attempt is None else call.by.task_id,
            lease_id=None if attempt is None else call.by.lease_id,
            attempt_limit_micro_usd=limit,
        )
        return self._cost.reserve(wanted) if attempt is None else self._cost.draw(wanted)

    def _estimated_tokens(self, call: CallRecord, target: ModelTarget) -> TokenCounts:
        output = 0
        if call.kind == "chat":
            info = self._registry.model_info(target.name)
            output = requested_cap(call.request) or default_cap(info, call.input_tokens, call.max_tokens)
        return TokenCounts(input_tokens=min(call.input_tokens, MAX_TOKENS), output_tokens=min(output, MAX_TOKENS))

    def _expiry(self) -> str:
        """Return the time until which money is reserved for a call that begins now.

        The call must have ended by then, because the duration of calls is limited.
        """
        return clock.now(self._settings.get(TOTAL_TIMEOUT_SECONDS) + GRACE_SECONDS)

    def release(self, call: CallRecord) -> None:
        """Release the money reserved for the call."""
        self._cost.release(call.hold)

    def hold_cost_of_fallback(self, call: CallRecord, target: ModelTarget) -> Hold | None:
        """Reserve the estimated cost of sending the call to a fallback target.

        Return None if no budget limits the call.
        """
        return self.hold_cost(call, target, self._leases.live_attempt(call.by))

    def report_refusal(self, by: Principal, refused: BudgetRefused) -> None:
        """Cancel or delay the caller's task after a budget refused one of its calls.

        If the task's own cost limit refused the call, the task is cancelled. Otherwise, the task waits until the budget
        allows the call.
        """
        if refused.scope == "task":
            self._leases.stop_run(by, kind="budget")
        elif refused.shortage is not None:
            self._leases.record_shortage(by, refused.scope, refused.shortage)
