"""Run-time settings of the `approvals` plugin."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from corral.plugin import Setting
from corral.schema.fields import Id, Slug


class AutoApproveRule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A rule that approves requests without a person.

    The request must be a call to `tool` (a name, or a prefix such as `tasks.*`), must come from the agent `agent_id`,
    and must have at most the risk `max_risk`. Its task must have cost at most `max_cost_usd`. The CEL expression
    `when`, which can refer to `payload`, `agent` and `task`, must be true. Absent fields restrict nothing.
    """

    id: Slug
    tool: Annotated[str, Meta(min_length=1, max_length=200)] | None = None
    agent_id: Id | None = None
    max_risk: Literal["low", "medium"] = "low"
    max_cost_usd: Annotated[float, Meta(ge=0, le=1_000_000_000)] | None = None
    when: Annotated[str, Meta(min_length=1, max_length=4096)] | None = None


DEFAULT_TTL = Setting(
    name="approvals.default_ttl_seconds",
    kind=int,
    default=86_400,
    minimum=900,
    maximum=2_592_000,
    title="Seconds for which an approval stays open, unless its request sets another time",
)
REQUIRE_SECOND_PERSON = Setting(
    name="approvals.require_second_person",
    kind=bool,
    default=False,
    own_session=True,
    title="Whether the requester of a task and the owner of its agent are excluded from deciding the agent's requests",
)
REQUIRE_MFA_FOR_HIGH = Setting(
    name="approvals.require_mfa_for_high",
    kind=bool,
    default=False,
    own_session=True,
    title="Whether deciding approval requests of high and critical risk requires a recent confirmation of the password "
    "or a code",
)
REJECT_COOLDOWN = Setting(
    name="approvals.reject_cooldown_seconds",
    kind=int,
    default=600,
    minimum=0,
    maximum=86_400,
    title="Seconds after a rejection during which the same request of the same task is rejected again",
)
REMINDER = Setting(
    name="approvals.reminder_seconds",
    kind=int,
    default=3600,
    minimum=0,
    maximum=604_800,
    title="Seconds between reminders about an approval request that nobody has decided (0: no reminders)",
)
MAX_OPEN = Setting(
    name="approvals.max_open_per_task",
    kind=int,
    default=10,
    minimum=1,
    maximum=100,
    title="Maximum number of open approval requests of a task",
)
AUTO_APPROVE = Setting[list[AutoApproveRule]](
    name="approvals.auto_approve",
    kind=list[AutoApproveRule],
    default=[],
    maximum=50,
    own_session=True,
    title="Rules that approve requests of low or medium risk without a person",
    description="The rules for automatic approval never apply to runs that have read untrusted content.",
)
UNCHECKED = (DEFAULT_TTL, REQUIRE_SECOND_PERSON, REQUIRE_MFA_FOR_HIGH, REJECT_COOLDOWN, REMINDER, MAX_OPEN)
"""All settings except `AUTO_APPROVE`. The plugin adds a check of the conditions to `AUTO_APPROVE`."""
