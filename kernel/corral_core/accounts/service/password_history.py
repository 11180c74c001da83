"""How long a password lasts, and that former ones do not come back."""

from __future__ import annotations

from corral import clock
from corral.database.engine import Work
from corral.errors import Invalid
from corral.ids import new_id
from corral.plugin import Settings
from corral_core.accounts.models import FormerPasswordRow, UserRow
from corral_core.accounts.service.passwords import Passwords
from corral_core.accounts.settings import DAY, HISTORY, MAX_AGE_DAYS


class PasswordHistory:
    """The only writer of former passwords. What is not `refuse_former` joins the unit."""

    def __init__(self, work: Work, passwords: Passwords, settings: Settings) -> None:
        self._work, self._passwords, self._settings = work, passwords, settings

    async def refuse_former(self, user_id: str, password: str, *, pointer: str) -> None:
        """Raise `Invalid` (`weak_password`) for the present password or a former one, where the policy keeps them.

        Call it once the caller is known to be the user: what it answers tells of former passwords.
        """
        kept = self._settings.get(HISTORY)
        if not kept:
            return
        for hashed in await self._work(lambda: self._known(user_id, kept), read=True):
            if await self._passwords.verify(password, hashed, pointer=pointer):
                detail = f"Do not use the present password or one of your last {kept} again."
                raise Invalid.at(pointer, "core.reused", detail, problem="weak_password")

    def remember(self, user_id: str, hashed: str | None) -> None:
        """This password was replaced; as many are kept as the policy asks for."""
        kept = self._settings.get(HISTORY)
        mine = FormerPasswordRow.user_id == user_id
        if kept and hashed is not None:
            FormerPasswordRow.create(id=new_id(), user_id=user_id, hash=hashed)
        newest = FormerPasswordRow.select(FormerPasswordRow.id).where(mine).order_by(FormerPasswordRow.id.desc())
        keep = [row.id for row in newest.limit(kept)] if kept else []
        FormerPasswordRow.delete().where(mine & FormerPasswordRow.id.not_in(keep)).execute()

    def expire(self, user: UserRow) -> None:
        """At a sign-in: a password that is too old must be changed before anything else."""
        days = self._settings.get(MAX_AGE_DAYS)
        if days is not None and (user.password_changed_at or "") <= clock.now(-days * DAY):
            due = (UserRow.id == user.id) & (UserRow.password_hash == user.password_hash)
            UserRow.update(must_change_password=True).where(due).execute()

    @staticmethod
    def forget(user_id: str) -> None:
        """The account is purged."""
        FormerPasswordRow.delete().where(FormerPasswordRow.user_id == user_id).execute()

    @staticmethod
    def _known(user_id: str, kept: int) -> list[str]:
        newest = FormerPasswordRow.select().where(FormerPasswordRow.user_id == user_id)
        former = [row.hash for row in newest.order_by(FormerPasswordRow.id.desc()).limit(kept)]
        present = UserRow.get_or_none(UserRow.id == user_id)
        return ([present.password_hash] if present is not None and present.password_hash else []) + former
