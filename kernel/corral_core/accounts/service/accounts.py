"""Creates, changes and purges user accounts. Only this module writes their profiles, rights and passwords."""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import msgspec
import peewee

from corral import clock
from corral.auth.credentials import Credentials
from corral.auth.permissions import Permissions
from corral.auth.principal import SYSTEM_PRINCIPAL, Principal
from corral.database.dialect import advisory_lock
from corral.database.unit import after_commit, locked
from corral.errors import Conflict, NotFound
from corral.events.event import emit
from corral.http.answers import ANY_VERSION, IfMatch
from corral.http.page import Page, newest_first, paginate
from corral.ids import new_id
from corral.plugin import SECRET_CHANGE, Audit, AuditEntry
from corral_core.accounts.api import (
    AccountDetails,
    InsufficientRights,
    NewUser,
    UserApiKeys,
    UserCreated,
    UserDeactivated,
    UserPatch,
    UserPurged,
    UserQuery,
    UserReactivated,
    UserUpdated,
    UserView,
)
from corral_core.accounts.models import UserRow, set_installation_value_once
from corral_core.accounts.service.audit_actions import audit_action, is_own_change
from corral_core.accounts.service.email_addresses import normalize_address, validate_email
from corral_core.accounts.service.first_account import FirstAccountSetup
from corral_core.accounts.service.invitations import InvitationsService
from corral_core.accounts.service.links import EMAIL_LINKS, PASSWORD_LINKS, SingleUseLinks
from corral_core.accounts.service.mail import MailService
from corral_core.accounts.service.passwords import PasswordHistory, PasswordPolicy, Passwords
from corral_core.accounts.service.second_factor import SecondFactor, delete_second_factor
from corral_core.accounts.service.sessions import Sessions

DELETED_NAME = "deleted user"
MAX_NAMED = 100
NO_CHANGES: Mapping[str, tuple[Any, Any]] = {}


class AccountsService:
    """Creates, finds, changes and purges user accounts. Implements `corral_core.accounts.api.Accounts`."""

    audit: Audit | None = None
    keys: UserApiKeys | None = None

    def __init__(
        self,
        passwords: Passwords,
        policy: PasswordPolicy,
        permissions: Permissions,
        sessions: Sessions,
        credentials: Credentials,
        links: SingleUseLinks,
        mail: MailService,
        life: PasswordHistory,
        second: SecondFactor,
        first: FirstAccountSetup,
    ) -> None:
        self._passwords, self._policy, self._permissions = passwords, policy, permissions
        self._sessions, self._credentials = sessions, credentials
        self._links, self._mail, self._life, self._second, self._first = links, mail, life, second, first

    async def hash_password(
        self, password: str, *, email: str, full_name: str, pointer: str = "/password", user_id: str | None = None
    ) -> str:
        """Check a new password against the policy and hash it.

        Raise `Invalid` (`weak_password`) if it breaks a rule.
        """
        self._policy.check_password(password, email=email, full_name=full_name, pointer=pointer)
        if user_id is not None:
            await self._life.refuse_former(user_id, password, pointer=pointer)
        return await self._passwords.hash_password(password, pointer=pointer)

    def create(
        self, new: NewUser, *, password_hash: str | None, by: Principal, how: str = "admin", verified: bool = True
    ) -> UserView:
        key = validate_email(new.email)
        now = clock.now()
        row = UserRow(
            id=new_id(),
            email=new.email.strip(),
            email_key=key,
            full_name=new.full_name,
            role=new.role,
            name_key=normalize_address(new.full_name),
            email_verified=verified,
            must_change_password=new.must_change_password,
            password_hash=password_hash,
            password_changed_at=now if password_hash else None,
            created_by=by.user_id,
            created_at=now,
            updated_at=now,
        )
        insert = UserRow.insert(row.__data__).on_conflict_ignore()
        if not insert.as_rowcount().execute():
            known = UserRow.get_or_none(UserRow.email_key == key)
            existing = {"existing_id": known.id} if known is not None and by.is_admin else {}
            raise Conflict("An account with this email address already exists.", code="duplicate", **existing)
        after_commit(self._first.discard_token)
        created = UserCreated(user_id=row.id, role=new.role, how=how)
        emit(created, object=("user", row.id), owner=row.id)
        self._record_audit(audit_action("create", row.id), row.id, {"how": how}, {"role": (None, new.role)})
        return user_view(row)

    def register(
        self, new: NewUser, password_hash: str, *, how: str = "registration", verified: bool = False
    ) -> UserView:
        """Create an account through registration. If `verified` is true, the address counts as verified."""
        return self.create(new, password_hash=password_hash, by=SYSTEM_PRINCIPAL, how=how, verified=verified)

    def create_bootstrap_admin(self, new: NewUser, password_hash: str) -> UserView | None:
        """Create the admin that environment variables define. Return None if an admin exists or has ever existed."""
        if self.has_admin() or not set_installation_value_once("first_admin", "bootstrap"):
            return None
        return self.create(new, password_hash=password_hash, by=SYSTEM_PRINCIPAL, how="bootstrap")

    @staticmethod
    def has_admin() -> bool:
        """Return whether any account, active or not, is an admin."""
        return bool(UserRow.select().where(UserRow.role == "admin").exists())

    def get(self, user_id: str) -> UserView:
        return user_view(self.get_row(user_id))

    def get_row(self, user_id: str, *, hold: bool = False) -> UserRow:
        """Return the row of an account. Raise `NotFound` for an unknown id. For `hold`, see `find_row`."""
        query: Any = UserRow.select().where(UserRow.id == user_id)
        row: UserRow | None = (locked(query) if hold else query).first()
        if row is None:
            raise NotFound("There is no user with this id.")
        return row

    def find_row(self, email: str, *, hold: bool = False) -> UserRow | None:
        """Return the row with this address, ignoring case, or None.

        If `hold` is true, the row is locked until the unit of work ends.
        """
        query: Any = UserRow.select().where(UserRow.email_key == normalize_address(email))
        row: UserRow | None = (locked(query) if hold else query).first()
        return row

    def get_many(self, user_ids: Iterable[str]) -> dict[str, UserView]:
        return {row.id: user_view(row) for row in UserRow.select().where(UserRow.id.in_(list(user_ids)))}

    def get_details(self, user_ids: Iterable[str]) -> dict[str, AccountDetails]:
        rows: Any = UserRow.select(UserRow.id, UserRow.created_by).where(UserRow.id.in_(list(user_ids))).tuples()
        created: dict[str, str | None] = dict(rows)
        live = self._sessions.count_by_user(created)
        return {
            user_id: AccountDetails(created_by=by, sessions=live.get(user_id, 0)) for user_id, by in created.items()
        }

    def find(self, email: str) -> UserView | None:
        row = self.find_row(email)
        return None if row is None else user_view(row)

    def ids_by_name(self, names: Iterable[str]) -> dict[str, list[str]]:
        prefixes = {name: normalize_address(name if "@" in name else f"{name}@") for name in names}
        matches = [
            UserRow.email_key == prefix if "@" in name else UserRow.email_key.startswith(prefix)
            for name, prefix in prefixes.items()
        ]
        if not matches:
            return {}
        is_one = UserRow.is_active & functools.reduce(operator.or_, matches)
        rows: Any = UserRow.select(UserRow.id, UserRow.email_key).where(is_one).order_by(UserRow.id)
        keys = [(str(user_id), str(key)) for user_id, key in rows.limit(MAX_NAMED).tuples()]
        return {
            name: [each for each, key in keys if (key == prefix if "@" in name else key.startswith(prefix))]
            for name, prefix in prefixes.items()
        }

    def required_action(self, user: UserView) -> str | None:
        done = {"must_change_password": user.must_change_password, "mfa_enabled": user.mfa_enabled}
        return self._second.required_action(user.role, **done)

    def principal_of(self, user_id: str | None, *needs: str) -> Principal:
        row: UserRow | None = UserRow.get_or_none(UserRow.id == user_id)
        if row is None:
            raise InsufficientRights("The user on whose behalf the operation runs no longer exists.")
        if not row.is_active:
            raise InsufficientRights("The user on whose behalf the operation runs is deactivated.")
        principal = self._principal(row)
        for need in needs:
            if need not in principal.permissions:
                raise InsufficientRights(
                    f"The user on whose behalf the operation runs does not hold the permission {need}."
                )
        return principal

    def principals_of(self, user_ids: Iterable[str]) -> dict[str, Principal]:
        active = UserRow.select().where(UserRow.id.in_(list(user_ids)) & UserRow.is_active)
        return {row.id: self._principal(row) for row in active}

    def _principal(self, row: UserRow) -> Principal:
        held = self._permissions.held_by(row.role)
        done = {"must_change_password": row.must_change_password, "mfa_enabled": row.mfa_enabled}
        limited = self._second.required_action(row.role, **done)
        return Principal(kind="user", id=row.id, user_id=row.id, role=row.role, permissions=held, limited=limited)

    def list(self, query: UserQuery, caller: Principal) -> Page[UserView]:
        rows: Any = UserRow.select().where(UserRow.purged_at.is_null())
        if query.role:
            rows = rows.where(UserRow.role.in_(query.role))
        if isinstance(query.is_active, bool):
            rows = rows.where(UserRow.is_active == query.is_active)
        if query.search:
            text = normalize_address(query.search)
            rows = rows.where(UserRow.email_key.contains(text) | UserRow.name_key.contains(text))
        return paginate(rows, query, caller, scope="users", order=newest_first(UserRow), make=user_view)

    def count_by_role(self) -> dict[tuple[str, bool], int]:
        number = peewee.fn.COUNT(UserRow.id)
        query: Any = UserRow.select(UserRow.role, UserRow.is_active, number).where(UserRow.purged_at.is_null())
        rows = query.group_by(UserRow.role, UserRow.is_active).tuples()
        return {(role, bool(active)): int(count) for role, active, count in rows}

    def update(
        self, user_id: str, patch: UserPatch, *, if_match: IfMatch = ANY_VERSION, verified: bool = True
    ) -> UserView:
        row = self.get_row(user_id)
        if row.purged_at is not None:
            raise NotFound("There is no user with this id.")
        if_match.check(row.version)
        changes = self._changed_columns(row, patch, verified)
        if not changes:
            return user_view(row)
        update_row(row, changes)
        self._publish_changes(row, changes)
        self._forget_cached_rights(row.id)
        return self.get(user_id)

    def set_password(self, user_id: str, password_hash: str, *, must_change: bool = False) -> UserView:
        self.replace_password(self.get_row(user_id), password_hash, must_change=must_change, revoke_api_keys=False)
        self.end_sessions(user_id, "password_changed")
        return self.get(user_id)

    def replace_password(self, row: UserRow, password_hash: str, *, must_change: bool, revoke_api_keys: bool) -> None:
        """Store a new password hash and invalidate all links of the user. The caller must end the sessions.

        Raise `Conflict` if the password was changed concurrently.
        """
        now = clock.now()
        known = row.password_hash
        old = UserRow.password_hash.is_null() if known is None else UserRow.password_hash == known
        changed = (
            UserRow.update(
                password_hash=password_hash,
                password_changed_at=now,
                must_change_password=must_change,
                updated_at=now,
                version=UserRow.version + 1,
            )
            .where((UserRow.id == row.id) & old)
            .execute()
        )
        if not changed:
            raise Conflict(
                "The password was changed in the meantime; sign in with the new password.", current_status="changed"
            )
        if revoke_api_keys and self.keys is not None:
            self.keys.revoke_keys_of(row.id)
        emit(UserUpdated(user_id=row.id, changed=["password"]), object=("user", row.id), owner=row.id)
        self._life.add_password(row.id, known)
        self._links.end_links(row.id, (*PASSWORD_LINKS, *EMAIL_LINKS))
        self._mail.notify(row.email, "password_changed")
        self._record_audit("auth.password.change", row.id, {}, {"password": SECRET_CHANGE})
        self._forget_cached_rights(row.id)

    def drop_password(self, user_id: str, *, if_match: IfMatch = ANY_VERSION) -> UserRow:
        """Delete the password, end all sessions and invalidate all links.

        The user needs a new link in order to set a new password. Raise `NotFound` if the account does not exist or was
        purged.
        """
        row = self.get_row(user_id, hold=True)
        if row.purged_at is not None:
            raise NotFound("There is no user with this id.")
        if_match.check(row.version)
        dropped = UserRow.update(password_hash=None, updated_at=clock.now(), version=UserRow.version + 1)
        dropped.where(UserRow.id == user_id).execute()
        self._life.add_password(user_id, row.password_hash)
        self._links.end_links(user_id, (*PASSWORD_LINKS, *EMAIL_LINKS))
        self.end_sessions(user_id, "password_changed")
        self._record_audit(
            "auth.password.reset" if is_own_change(user_id) else "admin.user.reset_password", user_id, {}
        )
        return self.get_row(user_id)

    def set_password_by_link(self, row: UserRow, password_hash: str, *, proves: str | None) -> None:
        """Store a new password hash for a user who opened a link, and end all sessions of the user.

        `proves` is the address to which the link was sent. If the account still has this address, it becomes verified,
        because the user opened the link.
        """
        self.replace_password(row, password_hash, must_change=False, revoke_api_keys=False)
        self.end_sessions(row.id, "password_changed")
        if proves is not None and normalize_address(proves) == row.email_key and not row.email_verified:
            self.prove_email(row, proves)

    def prove_email(self, row: UserRow, email: str) -> UserView:
        """Mark `email` as verified. If the account has a different address, `email` replaces it.

        Raise `Conflict` if another account has the address (`duplicate`), or if the account was changed concurrently.
        """
        key = validate_email(email)
        if UserRow.select().where((UserRow.email_key == key) & (UserRow.id != row.id)).exists():
            raise address_taken_error()
        changes = {"email": email.strip(), "email_key": key, "email_verified": True}
        changes = {name: value for name, value in changes.items() if getattr(row, name) != value}
        update = UserRow.update(**changes, updated_at=clock.now(), version=UserRow.version + 1)
        with translate_duplicate_address():
            proved = update.where((UserRow.id == row.id) & (UserRow.email_key == row.email_key)).execute()
        if not proved:
            raise Conflict("The account was changed in the meantime; request a new link.", current_status="changed")
        self._publish_changes(row, changes)
        return self.get(row.id)

    def store_new_hash(self, row: UserRow, password_hash: str) -> None:
        """Store a new hash of the same password. Do nothing if the password was changed in the meantime."""
        same = (UserRow.id == row.id) & (UserRow.password_hash == row.password_hash)
        UserRow.update(password_hash=password_hash).where(same).execute()

    def end_sessions(self, user_id: str, reason: str, *, keep: str | None = None) -> int:
        return self._sessions.end_all(user_id, reason, keep=keep)

    def purge(self, user_id: str) -> None:
        row = self.get_row(user_id, hold=True)
        if row.purged_at is not None:
            return
        if row.is_active:
            raise Conflict("The account is active; deactivate it before you purge it.", current_status="active")
        now = clock.now()
        UserRow.update(
            email="",
            email_key=f"purged:{row.id}",
            full_name=DELETED_NAME,
            name_key=None,
            password_hash=None,
            preferences={},
            timezone="UTC",
            locale="en",
            mfa_enabled=False,
            last_login_at=None,
            purged_at=now,
            updated_at=now,
            version=UserRow.version + 1,
        ).where(UserRow.id == row.id).execute()
        self.end_sessions(row.id, "user_deactivated")
        self._sessions.erase_device_details(row.id)
        for subject_id in (row.id, *InvitationsService.delete_of_user(row.id, row.email_key)):
            self._links.delete_links_of(subject_id)
        self._mail.delete_mail_jobs(row.email_key)
        self._life.delete_of_user(row.id)
        delete_second_factor(row.id)
        emit(UserPurged(user_id=row.id), object=("user", row.id), owner=row.id)
        self._record_audit(audit_action("purge", row.id), row.id, {})

    # -- helpers

    @staticmethod
    def _changed_columns(row: UserRow, patch: UserPatch, verified: bool) -> dict[str, Any]:
        """Return the columns that the patch changes, with their new values.

        `verified` tells whether a new address counts as verified.
        """
        wanted = {name: value for name, value in msgspec.structs.asdict(patch).items() if value is not msgspec.UNSET}
        if "email" in wanted:
            wanted["email"] = wanted["email"].strip()
            wanted["email_key"] = validate_email(wanted["email"])
            if wanted["email_key"] != row.email_key:
                wanted["email_verified"] = verified
            if UserRow.select().where((UserRow.email_key == wanted["email_key"]) & (UserRow.id != row.id)).exists():
                raise address_taken_error()
        if "full_name" in wanted:
            wanted["name_key"] = normalize_address(wanted["full_name"])
        return {name: value for name, value in wanted.items() if getattr(row, name) != value}

    def _publish_changes(self, row: UserRow, changes: dict[str, Any]) -> None:
        """Emit events and record audit entries for the changes, and end the account's sessions if it lost rights."""
        if "email_key" in changes:
            self._links.end_links(row.id, (*PASSWORD_LINKS, *EMAIL_LINKS))
            self._mail.notify(row.email, "email_changed", new=changes["email"])
        changed = sorted(set(changes) - {"email_key", "name_key", "is_active"})
        if changed:
            emit(UserUpdated(user_id=row.id, changed=changed), object=("user", row.id), owner=row.id)
            told = {name: audited_values(row, changes, name) for name in changed}
            self._record_audit(audit_action("update", row.id), row.id, {}, told)
        if changes.get("is_active") is True:
            emit(UserReactivated(user_id=row.id), object=("user", row.id), owner=row.id)
            self._record_audit(audit_action("reactivate", row.id), row.id, {}, {"is_active": (False, True)})
        if changes.get("is_active") is False:
            emit(UserDeactivated(user_id=row.id), object=("user", row.id), owner=row.id)
            self._record_audit(audit_action("deactivate", row.id), row.id, {}, {"is_active": (True, False)})
            self.end_sessions(row.id, "user_deactivated")
        elif "role" in changes and not self._permissions.held_by(row.role) <= self._permissions.held_by(
            changes["role"]
        ):
            self.end_sessions(row.id, "revoked")

    def _forget_cached_rights(self, user_id: str) -> None:
        """Remove the user's cached rights after the commit, so that the next request reads them from the database."""
        after_commit(lambda: self._credentials.forget(lambda caller: caller.user_id == user_id))

    def _record_audit(
        self, action: str, user_id: str, details: dict[str, Any], changes: Mapping[str, tuple[Any, Any]] = NO_CHANGES
    ) -> None:
        if self.audit is not None:
            self.audit.record(
                AuditEntry(action=action, object_type="user", object_id=user_id, details=details, changes=changes)
            )


def user_view(row: UserRow) -> UserView:
    """Convert a row to the account view that the API returns. An expired lockout is omitted."""
    fields = {name: getattr(row, name) for name in UserView.__struct_fields__}
    if row.locked_until is not None and row.locked_until <= clock.now():
        fields["locked_until"] = None
    return UserView(**fields)


def update_row(row: UserRow, changes: Mapping[str, Any]) -> None:
    """Update an account's row. Raise `Conflict` if it was changed concurrently, or if no active admin would remain."""
    stays = changes.get("role", "admin") == "admin" and changes.get("is_active", True)
    loses_admin = row.role == "admin" and row.is_active and not stays
    where = (UserRow.id == row.id) & (UserRow.version == row.version)
    if loses_admin:
        _lock_admins()
        other = UserRow.alias()
        rest = other.select(peewee.fn.COUNT(other.id)).where(
            (other.role == "admin") & (other.is_active == True) & (other.id != row.id)  # noqa: E712  # SQL
        )
        where &= rest > 0
    update = UserRow.update(**changes, updated_at=clock.now(), version=UserRow.version + 1)
    with translate_duplicate_address():
        if update.where(where).execute():
            return
    if loses_admin and UserRow.get_by_id(row.id).version == row.version:
        raise Conflict("This is the last active admin; make another user an admin first.", code="last_admin")
    raise Conflict(
        "The account was changed in the meantime; fetch it again and repeat the change.", current_status="changed"
    )


def address_taken_error() -> Conflict:
    """Return the problem to raise if another account already uses the email address."""
    return Conflict("Another account already has this email address.", code="duplicate")


@contextlib.contextmanager
def translate_duplicate_address() -> Iterator[None]:
    """Convert a violation of the unique index on email addresses to the problem that `address_taken_error` returns."""
    try:
        yield
    except peewee.IntegrityError:
        raise address_taken_error() from None


def _lock_admins() -> None:
    """Acquire a lock that serialises changes that could remove the last admin."""
    advisory_lock("accounts.admins")


RIGHTS = frozenset({"role", "is_active", "must_change_password", "email_verified"})


def audited_values(row: UserRow, changes: Mapping[str, Any], name: str) -> tuple[Any, Any]:
    """Return a column's old and new values for the audit log.

    For personal data, return `SECRET_CHANGE` instead, so that the audit log contains no personal data of purged
    accounts, only their ids.
    """
    return (getattr(row, name), changes[name]) if name in RIGHTS else SECRET_CHANGE
