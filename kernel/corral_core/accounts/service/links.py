"""Single-use links that reset a password, verify an email address or accept an invitation.

Every function runs in the caller's unit of work. The token of a link has 256 random bits, and only its SHA-256 hash is
stored. The token is in the fragment of the URL, which browsers do not send to servers, so servers cannot log it.
"""

from __future__ import annotations

import socket
from typing import Any
from urllib.parse import quote, urlsplit

from corral import clock
from corral.crypto import digest, new_secret
from corral.errors import Gone
from corral.ids import new_id
from corral.plugin import InstallationConfig
from corral_core.accounts.models import LinkRow, UserRow

MINUTE, HOUR, DAY = 60, 3600, 86_400
RESET, SET_PASSWORD, VERIFY, CHANGE_EMAIL, INVITATION = (
    "reset",
    "set_password",
    "verify",
    "change_email",
    "invitation",
)
LIFE_SECONDS = {RESET: 30 * MINUTE, SET_PASSWORD: 7 * DAY, VERIFY: DAY, CHANGE_EMAIL: DAY, INVITATION: 7 * DAY}
PAGES = {
    RESET: "reset-password",
    SET_PASSWORD: "reset-password",
    VERIFY: "verify-email",
    CHANGE_EMAIL: "verify-email",
    INVITATION: "accept-invitation",
}
PASSWORD_LINKS = (RESET, SET_PASSWORD)
EMAIL_LINKS = (VERIFY, CHANGE_EMAIL)
UNSENT_SECONDS = 12 * HOUR  # how long an unsent link is kept; longer than the mail job is retried
MOST_LIVE = 3
KEEP_DAYS = 7


class SingleUseLinks:
    """Creates, redeems and invalidates single-use links. Only this class writes links."""

    def __init__(self, installation: InstallationConfig) -> None:
        self._public, self._bind = installation.public_url, installation.bind
        self._scheme = "https" if installation.has_tls else "http"
        self._port: int | None = None

    def set_server_address(self, address: str) -> None:
        """Set the address at which the server accepts connections.

        The port of this address differs from the port in `server.bind` if the operating system chooses the port.
        """
        self._port = urlsplit(address).port

    def set_bind_address(self, place: str) -> None:
        """Set the `host:port` at which a server in another process accepts connections.

        Commands use this method, because the address may differ from `server.bind`.
        """
        self._bind = place

    def create_link(self, kind: str, subject_id: str, email: str | None = None) -> str | None:
        """Create a link whose token is generated later, when the link is emailed. Return the id of the link.

        Return None if the account or invitation already has `MOST_LIVE` valid links of this kind.
        """
        # The update locks the row of the account, so that the count stays correct until the commit.
        UserRow.update(version=UserRow.version).where(UserRow.id == subject_id).execute()
        if LinkRow.select().where(_live_links(kind, subject_id)).count() >= MOST_LIVE:
            return None
        row = LinkRow.create(
            id=new_id(),
            kind=kind,
            subject_id=subject_id,
            email=email,
            created_at=clock.now(),
            expires_at=clock.now(UNSENT_SECONDS),
        )
        return str(row.id)

    def generate_token(self, link_id: str) -> str | None:
        """Generate and return a token for a link created with `create_link`.

        Any earlier token of the link becomes invalid. Return None if the link was used or invalidated.
        """
        row: LinkRow | None = LinkRow.get_or_none(LinkRow.id == link_id)
        if row is None:
            return None
        token = new_secret()
        mine = (LinkRow.id == link_id) & LinkRow.used_at.is_null()
        armed = LinkRow.update(hash=digest(token), expires_at=clock.now(LIFE_SECONDS[row.kind])).where(mine).execute()
        return token if armed else None

    def invalidate_token(self, link_id: str) -> None:
        """Invalidate the token of a link whose email was not sent. The next sending attempt generates a new token."""
        mine = (LinkRow.id == link_id) & LinkRow.used_at.is_null()
        LinkRow.update(hash=None, expires_at=clock.now(UNSENT_SECONDS)).where(mine).execute()

    def delete_link(self, link_id: str) -> None:
        """Delete a link whose email can never be delivered."""
        LinkRow.delete().where((LinkRow.id == link_id) & LinkRow.used_at.is_null()).execute()

    def issue_url(self, kind: str, subject_id: str, email: str | None = None) -> str:
        """Create a link and return its URL, which is shown only once.

        If the account or invitation already has `MOST_LIVE` valid links of this kind, invalidate the oldest one.
        """
        link_id = self.create_link(kind, subject_id, email)
        if link_id is None:
            oldest = (
                LinkRow.select(LinkRow.id).where(_live_links(kind, subject_id)).order_by(LinkRow.created_at).limit(1)
            )
            LinkRow.update(used_at=clock.now()).where(LinkRow.id.in_(oldest)).execute()
            return self.issue_url(kind, subject_id, email)
        token = self.generate_token(link_id)
        assert token is not None
        return self.link_url(kind, token)

    def find_link(self, kinds: tuple[str, ...], token: str) -> LinkRow:
        """Return the valid link with this token. Raise `Gone` (`link_expired`) if there is none."""
        row: LinkRow | None = LinkRow.get_or_none(_redeemable_links(kinds, token))
        if row is None:
            raise self.link_expired_error()
        return row

    def redeem_link(self, kinds: tuple[str, ...], token: str) -> LinkRow:
        """Mark a link as used with a single conditional UPDATE, and return the link.

        Raise `Gone` (`link_expired`) if the token is unknown, used or expired.
        """
        update = LinkRow.update(used_at=clock.now()).where(_redeemable_links(kinds, token)).returning(LinkRow)
        found: list[LinkRow] = list(update.execute())
        if not found:
            raise self.link_expired_error()
        return found[0]

    def end_links(self, subject_id: str, kinds: tuple[str, ...]) -> None:
        """Invalidate the valid links of these kinds for an account or invitation."""
        mine = (LinkRow.subject_id == subject_id) & LinkRow.kind.in_(kinds) & LinkRow.used_at.is_null()
        LinkRow.update(used_at=clock.now()).where(mine).execute()

    def delete_links_of(self, subject_id: str) -> None:
        """Delete every link of a purged account or a deleted invitation."""
        LinkRow.delete().where(LinkRow.subject_id == subject_id).execute()

    @property
    def base_url(self) -> str:
        """The URL at which users reach the server, without a trailing slash."""
        return (self._public or self._own_address()).rstrip("/")

    def link_url(self, kind: str, token: str) -> str:
        """Return the absolute URL of a link, with the token in its fragment.

        The URL begins with `CORRAL_PUBLIC_URL` or, if this variable is not set, with the address of this server.
        """
        return f"{self.base_url}/account/{PAGES[kind]}#token={quote(token)}"

    @staticmethod
    def link_expired_error() -> Gone:
        """Return the problem to raise for an invalid link."""
        return Gone("The link was already used or replaced, or it has expired; request a new one.", code="link_expired")

    def _own_address(self) -> str:
        place = urlsplit(f"//{self._bind}")
        everywhere = place.hostname in ("0.0.0.0", "::")  # noqa: S104  (compared, not bound)
        host = socket.gethostname() if everywhere else place.netloc.rpartition(":")[0]
        return f"{self._scheme}://{host}:{self._port or place.port}"


def delete_expired_links(at_once: int = 500) -> int:
    """Delete at most `at_once` links that expired more than `KEEP_DAYS` days ago.

    Return the number of deleted links.
    """
    old = LinkRow.select(LinkRow.id).where(LinkRow.expires_at <= clock.now(-KEEP_DAYS * DAY)).limit(at_once)
    return int(LinkRow.delete().where(LinkRow.id.in_(old)).execute())


def _live_links(kind: str, subject_id: str) -> Any:
    return (
        (LinkRow.subject_id == subject_id)
        & (LinkRow.kind == kind)
        & LinkRow.used_at.is_null()
        & (LinkRow.expires_at > clock.now())
    )


def _redeemable_links(kinds: tuple[str, ...], token: str) -> Any:
    is_live = LinkRow.used_at.is_null() & (LinkRow.expires_at > clock.now())
    return (LinkRow.hash == digest(token)) & LinkRow.kind.in_(kinds) & is_live
