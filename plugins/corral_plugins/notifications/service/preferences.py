"""Reads and changes people's notification preferences. Every method runs in the caller's unit of work."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import UNSET

from corral.auth.principal import Principal
from corral.schema.conversion import convert
from corral_plugins.notifications.models import Preference
from corral_plugins.notifications.shapes import Preferences, PreferencesPatch


class PreferenceManagement:
    """People's notification preferences."""

    def get(self, *, by: Principal) -> Preferences:
        """Return the caller's preferences."""
        row: Preference | None = Preference.get_or_none(Preference.user_id == by.user_id)
        if row is None:
            return Preferences()
        return convert(Preferences, {"mute": row.mute, "email": row.email, "quiet_hours": row.quiet_hours})

    def update(self, patch: PreferencesPatch, *, by: Principal) -> Preferences:
        """Change the caller's preferences."""
        given = {name: value for name, value in msgspec.structs.asdict(patch).items() if value is not UNSET}
        changes: dict[str, Any] = msgspec.to_builtins(given)
        if "mute" in changes:
            changes["mute"] = list(dict.fromkeys(changes["mute"]))
        Preference.insert(user_id=by.user_id).on_conflict_ignore().execute()
        if changes:
            Preference.update(changes).where(Preference.user_id == by.user_id).execute()
        return self.get(by=by)
