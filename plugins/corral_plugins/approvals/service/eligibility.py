"""Determines who may decide an approval request: the named approvers and admins, but not the requester."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import peewee

from corral.auth.permissions import Permissions
from corral.auth.principal import Principal
from corral.auth.visibility import NO_ROWS
from corral.errors import FieldError, Forbidden, Invalid
from corral.plugin import Settings
from corral_core.accounts.api import Accounts
from corral_plugins.approvals.api import RISKS, ApprovalRequest, Approvers, InvolvedPeople
from corral_plugins.approvals.models import Approval, ApproverRow
from corral_plugins.approvals.settings import REQUIRE_MFA_FOR_HIGH, REQUIRE_SECOND_PERSON

DECIDE = "approvals.decide"
HIGH = RISKS.index("high")


class Eligibility:
    """The rules about who may decide an approval request. Every method runs in the caller's unit of work."""

    def __init__(self, accounts: Accounts, permissions: Permissions, settings: Settings) -> None:
        self._accounts, self._permissions, self._settings = accounts, permissions, settings

    # -- the approvers of a new approval

    def default_approvers(self, risk: str, task_owner: str | None, needs: Sequence[str] = ()) -> Approvers:
        """Return the default approvers for a request that names none.

        If the risk is low or medium and the role `member` has all permissions in `needs`, all members and admins may
        decide. Otherwise, admins may decide, and also the user `task_owner` if that user has these permissions.
        """
        if RISKS.index(risk) < HIGH and self._permissions.held_by("member").issuperset(needs):
            return Approvers(roles=["admin", "member"])
        owner = None if task_owner is None else self._accounts.get_many([task_owner]).get(task_owner)
        is_able = owner is not None and self._permissions.held_by(owner.role).issuperset(needs)
        return Approvers(users=[task_owner] if is_able and task_owner is not None else [], roles=["admin"])

    def check_approvers(self, request: ApprovalRequest, approvers: Approvers) -> None:
        """Raise `Invalid` if a named approver may not decide, or if too few people may decide.

        At least as many people must be able to decide as there are required approvals.
        """
        named = {each.lower() for each in approvers.users}
        found = self._accounts.get_many(named)
        able = {each for each, user in found.items() if user.is_active and self._role_decides(user.role)}
        if missing := sorted(named - able):
            detail = f"{missing[0]} is not the id of an active user who may decide approval requests."
            fault = FieldError("/approvers/users", "unknown_reference", detail)
            raise Invalid(detail, code="unknown_reference", errors=(fault,))
        roles: set[str] = {"admin", *approvers.roles}
        count = len([each for each in able if found[each].role not in roles])
        count += sum(n for (role, active), n in self._accounts.count_by_role().items() if active and role in roles)
        asker = request.requested_by
        if asker.type == "user" and not request.allow_self and self._is_eligible_user(asker.id, roles, able):
            count -= 1
        if request.required_approvals > max(1, count):
            detail = f"Only {count} people may decide this request, so it can require at most {count} approvals."
            raise Invalid.at("/required_approvals", "too_large", detail)

    def _is_eligible_user(self, user_id: str, roles: set[str], able: set[str]) -> bool:
        user = self._accounts.get_many([user_id]).get(user_id)
        return user is not None and user.is_active and (user.role in roles or user_id in able)

    def _role_decides(self, role: str) -> bool:
        return DECIDE in self._permissions.held_by(role)

    # -- decisions

    def require_decider(self, row: Approval, by: Principal) -> None:
        """Raise `Forbidden` unless the caller may decide.

        The error code is `forbidden`, `self_approval` or `reauth_required`. The corresponding conditions are checked in
        this order.
        """
        if by.kind != "user" or not by.may(DECIDE) or not self._is_named(row, by.user_id, by.role):
            raise Forbidden("Only the approvers of this request and admins may decide it.")
        if missing := sorted(_needs_of(row) - by.permissions):
            raise Forbidden(f"Only users with the permission {missing[0]} may decide requests to call this tool.")
        if self._is_own_request(row, by.user_id):
            detail = "You made this request, or an agent made it for you; another admin or approver must decide it."
            raise Forbidden(detail, code="self_approval")
        needs_proof = is_high_risk(row) and self._settings.get(REQUIRE_MFA_FOR_HIGH)
        if needs_proof and not by.has_stepped_up:
            detail = "Confirm your password or a one-time code with `corral api POST /auth/reauth` first."
            raise Forbidden(detail, code="reauth_required")

    def can_decide(self, row: Approval, by: Principal) -> bool:
        """Return whether the caller may decide, regardless of whether the caller has recently reauthenticated."""
        if by.kind != "user" or not by.may(DECIDE) or not self._is_named(row, by.user_id, by.role):
            return False
        return not self._is_own_request(row, by.user_id) and _needs_of(row) <= by.permissions

    def users_still_eligible(self, row: Approval, user_ids: Sequence[str]) -> set[str]:
        """Return the subset of `user_ids` that belongs to users who may still decide an approval request.

        These users are active, have the necessary permissions, are among the approvers, and are not prevented from
        deciding because the request counts as their own (see `_is_own_request`).
        """
        found = self._accounts.get_many(user_ids)
        return {
            each
            for each, user in found.items()
            if user.is_active
            and self._permissions.held_by(user.role).issuperset((DECIDE, *_needs_of(row)))
            and self._is_named(row, each, user.role)
            and not self._is_own_request(row, each)
        }

    def involved(self, row: Approval) -> InvolvedPeople:
        """Return the people whom an approval concerns."""
        requester = row.requester_id if row.requester_type == "user" else row.on_behalf_of
        people = {requester, row.agent_owner_id} - {None}
        return InvolvedPeople(
            approvers=[Approvers(users=each["users"], roles=each["roles"]) for each in _approver_lists(row)],
            excluded=frozenset(each for each in people if self._is_own_request(row, each)),
            requester_id=requester,
        )

    @staticmethod
    def _is_named(row: Approval, user_id: str | None, role: str | None) -> bool:
        if role == "admin":
            return True
        return any(user_id in each["users"] or role in each["roles"] for each in _approver_lists(row))

    def _is_own_request(self, row: Approval, user_id: str | None) -> bool:
        """Return whether the user may not decide because the request is their own.

        A request made on the user's behalf or by the user's agent counts as the user's own if the setting
        `approvals.require_second_person` is on.
        """
        if row.requester_type == "user":
            return bool(row.requester_id == user_id and not row.allow_self)
        return self._settings.get(REQUIRE_SECOND_PERSON) and user_id in (row.on_behalf_of, row.agent_owner_id)

    def assigned_to(self, by: Principal) -> Any:
        """Return an SQL condition that selects the approval requests that the caller may decide.

        Unlike `can_decide`, the condition ignores the permissions that a held tool call requires of approvers.
        """
        if by.kind != "user" or not by.may(DECIDE):
            return NO_ROWS
        own = (Approval.requester_type == "user") & (Approval.requester_id == by.user_id) & ~Approval.allow_self
        if self._settings.get(REQUIRE_SECOND_PERSON):
            works_for = (Approval.on_behalf_of == by.user_id) | (Approval.agent_owner_id == by.user_id)
            own |= (Approval.requester_type != "user") & peewee.fn.COALESCE(works_for, False)
        if by.role == "admin":
            return ~own
        mine = ((ApproverRow.kind == "user") & (ApproverRow.name == by.user_id)) | (
            (ApproverRow.kind == "role") & (ApproverRow.name == by.role)
        )
        named = ApproverRow.select(peewee.SQL("1")).where((ApproverRow.approval_id == Approval.id) & mine)
        return ~own & peewee.fn.EXISTS(named)


def _needs_of(row: Approval) -> frozenset[str]:
    """Return the permissions that the held tool call requires of approvers."""
    return frozenset(() if row.tool_call is None else row.tool_call.get("required_permissions", ()))


def is_high_risk(row: Approval) -> bool:
    """Return whether the risk of the request is high or critical."""
    return row.risk in RISKS[HIGH:]


def _approver_lists(row: Approval) -> list[Any]:
    return [row.approvers, *([row.escalate_to] if row.escalated and row.escalate_to else [])]
