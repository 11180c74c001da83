"""Lists and creates user accounts for admins. The accounts themselves belong to the `accounts` plugin."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from corral.auth.principal import Principal
from corral.http.page import Page
from corral_core.accounts.api import AccountRecovery, Accounts, NewUser, PasswordLinks, UserQuery, UserView
from corral_plugins.admin.shapes import AdminUserView, CreatedUser
from corral_plugins.security.api import ApiKeyCounts

Views = list[AdminUserView]  # inside the class, `list` is a method


class UserAdministration:
    """Lists and creates accounts. The results contain details that only admins may see.

    Every method runs in the caller's unit of work.
    """

    keys: ApiKeyCounts | None

    def __init__(self, accounts: Accounts, rescue: AccountRecovery, links: PasswordLinks) -> None:
        self._accounts, self._rescue, self._links = accounts, rescue, links

    def list(self, query: UserQuery, caller: Principal) -> Page[AdminUserView]:
        """Return a page of accounts, newest first."""
        page = self._accounts.list(query, caller)
        return Page(
            items=self._admin_views(page.items), total=page.total, limit=page.limit, offset=page.offset, next=page.next
        )

    def get_admin_view(self, user: UserView) -> AdminUserView:
        """Return one account together with the details that only admins may see."""
        return self._admin_views([user])[0]

    def create(self, new: NewUser, password_hash: str | None, *, by: Principal) -> CreatedUser:
        """Create an account.

        If no password is given, a link for choosing one is emailed to the user, or returned if no mail server is
        configured.
        """
        made = self._accounts.create(new, password_hash=password_hash, by=by)
        url = self._links.send_welcome_link(made.id) if password_hash is None else None
        created = CreatedUser(**msgspec.structs.asdict(self.get_admin_view(made)))
        return created if url is None else msgspec.structs.replace(created, set_password_url=url)

    def _admin_views(self, users: Sequence[UserView]) -> Views:
        details = self._accounts.get_details([user.id for user in users])
        failed = self._rescue.failed_attempts([user.email for user in users])
        keys = {} if self.keys is None else self.keys.count_active_keys([user.id for user in users])
        return [
            AdminUserView(
                **msgspec.structs.asdict(user),
                created_by=details[user.id].created_by,
                sessions=details[user.id].sessions,
                api_keys=keys.get(user.id, 0),
                failed_attempts=failed.get(user.email, 0),
            )
            for user in users
        ]
