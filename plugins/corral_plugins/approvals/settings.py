"""Run-time settings of approvals."""

from __future__ import annotations

from corral.plugin import Setting

DEFAULT_TTL = Setting(
    name="approvals.default_ttl_seconds",
    kind=int,
    default=86_400,
    minimum=900,
    maximum=2_592_000,
    title="Seconds in which people may decide, unless a request says otherwise",
)
REQUIRE_SECOND_PERSON = Setting(
    name="approvals.require_second_person",
    kind=bool,
    default=False,
    own_session=True,
    title="Neither the requester of a task nor the owner of its agent may decide what the agent asks",
)
REQUIRE_MFA_FOR_HIGH = Setting(
    name="approvals.require_mfa_for_high",
    kind=bool,
    default=False,
    own_session=True,
    title="Deciding approvals of high and critical risk needs a recent confirmation of the password or a code",
)
REJECT_COOLDOWN = Setting(
    name="approvals.reject_cooldown_seconds",
    kind=int,
    default=600,
    minimum=0,
    maximum=86_400,
    title="Seconds in which the same request of a task is answered with its rejection",
)
REMINDER = Setting(
    name="approvals.reminder_seconds",
    kind=int,
    default=3600,
    minimum=0,
    maximum=604_800,
    title="Seconds between reminders of an approval that nobody has decided (0: no reminders)",
)
MAX_OPEN = Setting(
    name="approvals.max_open_per_task",
    kind=int,
    default=10,
    minimum=1,
    maximum=100,
    title="Maximum number of open approvals of a task",
)
ALL = (DEFAULT_TTL, REQUIRE_SECOND_PERSON, REQUIRE_MFA_FOR_HIGH, REJECT_COOLDOWN, REMINDER, MAX_OPEN)
