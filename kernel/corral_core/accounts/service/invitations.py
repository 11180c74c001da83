"""Invitations to create an account.

An admin chooses the address and the role, and the invited person creates the account through a link.
"""

from __future__ import annotations

import shlex
from typing import Any

from corral import clock
from corral.auth.principal import Principal
from corral.errors import Conflict, NotFound
from corral.events.event import emit
from corral.http.page import Page, PageQuery, newest_first, paginate
from corral.ids import new_id
from corral.plugin import Audit, AuditEntry
from corral_core.accounts.api import InvitationAccepted, InvitationCreated, InvitationView, Role
from corral_core.accounts.models import InvitationRow, UserRow
from corral_core.accounts.service.email_addresses import validate_email
from corral_core.accounts.service.links import INVITATION, LIFE_SECONDS, SingleUseLinks
from corral_core.accounts.service.mail import MailService

PENDING = InvitationRow.status == "pending"


class InvitationsService:
    """Creates, lists, accepts and revokes invitations. Implements `corral_core.accounts.api.Invitations`.

    Only this class writes invitations.
    """

    audit: Audit | None = None

    def __init__(self, links: SingleUseLinks, mail: MailService) -> None:
        self._links, self._mail = links, mail

    def create(self, email: str, role: Role, *, by: Principal) -> tuple[InvitationView, str]:
        key, email = validate_email(email), email.strip()
        account = UserRow.get_or_none(UserRow.email_key == key)
        if account is not None:
            raise Conflict(
                "An account with this email address already exists.", code="duplicate", existing_id=account.id
            )
        self._expire_invitations(key)
        row = InvitationRow(
            id=new_id(),
            email=email,
            email_key=key,
            role=role,
            created_by=by.user_id,
            created_at=clock.now(),
            expires_at=clock.now(LIFE_SECONDS[INVITATION]),
        )
        if not InvitationRow.insert(row.__data__).on_conflict_ignore().as_rowcount().execute():
            known = InvitationRow.get_or_none((InvitationRow.email_key == key) & PENDING)
            if known is None:
                raise Conflict("There is already an invitation for this address; revoke it first.", code="duplicate")
            command = f"corral invitations revoke {shlex.quote(known.email)}"
            raise Conflict(
                f"There is already an invitation for this address; revoke it first: {command}",
                code="duplicate",
                existing_id=known.id,
            )
        url = self._links.issue_url(INVITATION, row.id, email)
        self._mail.send_link(email, INVITATION, row.id, role=role)
        self._emit_event(InvitationCreated(invitation_id=row.id, role=role))
        self._record_audit("create", row)
        return invitation_view(row), url

    def list(self, query: PageQuery, caller: Principal) -> Page[InvitationView]:
        rows = InvitationRow.select()
        return paginate(
            rows, query, caller, scope="invitations", order=newest_first(InvitationRow), make=invitation_view
        )

    def revoke(self, invitation_id: str) -> None:
        mine = (InvitationRow.id == invitation_id) & PENDING & (InvitationRow.expires_at > clock.now())
        found: list[InvitationRow] = list(
            InvitationRow.update(status="revoked").where(mine).returning(InvitationRow).execute()
        )
        if not found:
            raise NotFound("There is no open invitation with this id.")
        self._links.end_links(invitation_id, (INVITATION,))
        self._record_audit("revoke", found[0])

    def find_pending(self, token: str) -> InvitationRow:
        """Return the pending invitation whose link has this token. Raise `Gone` (`link_expired`) if there is none."""
        return self._get_pending(self._links.find_link((INVITATION,), token).subject_id)

    def accept(self, token: str, user_id: str) -> None:
        """Accept the invitation for the new account.

        Raise `Gone` (`link_expired`) if the invitation is no longer pending.
        """
        link = self._links.redeem_link((INVITATION,), token)
        row = self._get_pending(link.subject_id)
        mine = (InvitationRow.id == row.id) & PENDING
        if not InvitationRow.update(status="accepted", accepted_by=user_id).where(mine).execute():
            raise self._links.link_expired_error()
        self._links.end_links(row.id, (INVITATION,))
        self._emit_event(InvitationAccepted(invitation_id=row.id, role=row.role))
        self._record_audit("accept", row)

    @staticmethod
    def delete_of_user(user_id: str, email_key: str) -> tuple[str, ...]:
        """Delete the invitations of a purged account. Return the ids of the deleted invitations.

        These are the invitations that the account accepted, and those that were sent to its address.
        """
        named = (InvitationRow.accepted_by == user_id) | (InvitationRow.email_key == email_key)
        return tuple(row.id for row in InvitationRow.delete().where(named).returning(InvitationRow).execute())

    def _get_pending(self, invitation_id: str) -> InvitationRow:
        row: InvitationRow | None = InvitationRow.get_or_none((InvitationRow.id == invitation_id) & PENDING)
        if row is None or row.expires_at <= clock.now():
            raise self._links.link_expired_error()
        return row

    @staticmethod
    def _expire_invitations(key: str) -> None:
        over = (InvitationRow.email_key == key) & PENDING & (InvitationRow.expires_at <= clock.now())
        InvitationRow.update(status="expired").where(over).execute()

    @staticmethod
    def _emit_event(event: InvitationCreated | InvitationAccepted) -> None:
        emit(event, object=("invitation", event.invitation_id))

    def _record_audit(self, verb: str, row: InvitationRow) -> None:
        if self.audit is not None:
            entry = AuditEntry(
                action=f"admin.invitation.{verb}",
                object_type="invitation",
                object_id=row.id,
                details={"role": row.role},
            )
            self.audit.record(entry)


def invitation_view(row: InvitationRow) -> InvitationView:
    """Convert a row to the view for admins. A pending invitation past its expiry is shown as `expired`."""
    fields: dict[str, Any] = {name: getattr(row, name) for name in InvitationView.__struct_fields__}
    if row.status == "pending" and row.expires_at <= clock.now():
        fields["status"] = "expired"
    return InvitationView(**fields)
