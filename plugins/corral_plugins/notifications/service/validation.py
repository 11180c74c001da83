"""Checks submitted channels and rules before anything is stored. Runs outside units of work."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec import UNSET

from corral.crypto import refuse_mask
from corral.errors import FieldError, Invalid
from corral.events.event import EventTypes
from corral.redact.encodings import is_redactable
from corral.schema.json_schema_validation import json_schema_errors
from corral_core.expressions.api import Expressions
from corral_plugins.notifications.models import Channel
from corral_plugins.notifications.service.channel_types import ChannelTypeRegistry
from corral_plugins.notifications.service.credentials import ChannelCredentials
from corral_plugins.notifications.service.event_catalogue import OWN_EVENT
from corral_plugins.notifications.service.fan_out import CONDITION_ROOTS
from corral_plugins.notifications.service.mentions import MENTION
from corral_plugins.notifications.service.quiet_hours import quiet_hours_faults
from corral_plugins.notifications.shapes import (
    ChannelPatch,
    NewChannel,
    NewNotificationRule,
    PreferencesPatch,
    RulePatch,
)

NOT_REDACTABLE = "not_redactable"
LEAST_REPEAT = 300


class CheckedConfig(msgspec.Struct, frozen=True, kw_only=True):
    """A config that has been checked: its members that are not secret, its secret members, and warnings.

    If the config of an existing channel was changed, `version` is the version of the channel before the change.
    """

    config: dict[str, Any]
    secrets: dict[str, str]
    warnings: list[str] = []
    version: int = 0


class ChannelChecks:
    """Checks the configs of channels."""

    def __init__(self, types: ChannelTypeRegistry, credentials: ChannelCredentials) -> None:
        self._types, self._credentials = types, credentials

    async def check_new_channel(self, new: NewChannel) -> CheckedConfig:
        """Check the config of a new channel."""
        return await self._check(new.type, new.config)

    async def check_channel_patch(self, row: Channel, patch: ChannelPatch) -> CheckedConfig | None:
        """Merge the submitted config into the config of a channel, and check the result.

        Return None if the config stays unchanged. Raise `Invalid` if the patch would change the type, or if the config
        is not valid.
        """
        if patch.type is not UNSET and patch.type != row.type:
            raise Invalid.at("/type", "not_allowed", "The type of a channel cannot be changed; create another channel.")
        if patch.config is UNSET:
            return None
        kind = self._types.require(row.type)
        _refuse_masks(patch.config, kind.secrets)
        stored = self._credentials.readable_secrets(row) or {}  # what is damaged has to be set again
        merged = {**row.config, **stored, **patch.config}
        checked = await self._check(row.type, {name: value for name, value in merged.items() if value is not None})
        return msgspec.structs.replace(checked, version=row.version)

    async def _check(self, type: str, config: Mapping[str, Any]) -> CheckedConfig:
        kind = self._types.require(type)
        _refuse_masks(config, kind.secrets)
        _raise_faults(_config_faults(kind.schema, dict(config)))
        warnings = [*(await kind.check(config))] if kind.check is not None else []
        secrets = {name: str(config[name]) for name in kind.secrets if name in config}
        warnings += [] if all(is_redactable(each) for each in secrets.values()) else [NOT_REDACTABLE]
        open_members = {name: value for name, value in config.items() if name not in kind.secrets}
        return CheckedConfig(config=open_members, secrets=secrets, warnings=list(dict.fromkeys(warnings)))


class RuleChecks:
    """Checks rules and preferences."""

    def __init__(self, types: EventTypes, expressions: Expressions) -> None:
        self._types, self._expressions = types, expressions

    def check_rule(self, given: NewNotificationRule | RulePatch) -> None:
        """Raise `Invalid` for unknown events, an invalid condition or an unknown time zone.

        Also raise `Invalid` for a repeat interval that is too short, that is, less than `LEAST_REPEAT` but not 0.
        """
        if given.events is not UNSET:
            self._check_events(given.events, "/events")
        if given.conditions is not UNSET and given.conditions is not None:
            roots = CONDITION_ROOTS
            _raise_faults(self._expressions.check_expression(given.conditions, roots=roots, pointer="/conditions"))
        repeat = given.repeat_interval_seconds
        if repeat is not UNSET and 0 < repeat < LEAST_REPEAT:
            detail = f"must be 0 (never) or at least {LEAST_REPEAT}"
            raise Invalid.at("/repeat_interval_seconds", "too_small", detail)
        if given.quiet_hours is not UNSET and given.quiet_hours is not None:
            _raise_faults(quiet_hours_faults(given.quiet_hours.timezone, "/quiet_hours"))

    def check_preferences(self, given: PreferencesPatch) -> None:
        """Raise `Invalid` for unknown events or an unknown time zone."""
        if given.mute is not UNSET:
            self._check_events(given.mute, "/mute", besides=(MENTION,))
        if given.quiet_hours is not UNSET and given.quiet_hours is not None:
            _raise_faults(quiet_hours_faults(given.quiet_hours.timezone, "/quiet_hours"))

    def _check_events(self, patterns: list[str], pointer: str, *, besides: tuple[str, ...] = ()) -> None:
        for index, pattern in enumerate(patterns):
            if pattern == OWN_EVENT or not (pattern in besides or self._types.is_known(pattern)):
                detail = (
                    f"No event that can cause notifications has the name {pattern}; `corral webhooks event-types` "
                    "lists all events."
                )
                raise Invalid.at(f"{pointer}/{index}", "not_in_enum", detail, problem="unknown_event")


def _refuse_masks(config: Mapping[str, Any], secrets: tuple[str, ...]) -> None:
    for name in secrets:
        if isinstance(config.get(name), str):
            refuse_mask(config[name], f"/config/{name}")


def _config_faults(schema: dict[str, Any], config: dict[str, Any]) -> list[FieldError]:
    """Validate a config. If the only fault is that exactly one of several choices must be given, name all of them."""
    faults = json_schema_errors(schema, config, pointer_prefix="/config")
    choices = schema.get("oneOf", ())
    if not faults or not choices or any(each.keys() != {"required"} for each in choices):
        return faults
    others = json_schema_errors({**schema, "oneOf": [{}]}, config, pointer_prefix="/config")
    told = ", or ".join(" and ".join(each["required"]) for each in choices)
    return others or [FieldError("/config", faults[0].code, f"give either {told}")]


def _raise_faults(faults: list[FieldError]) -> None:
    if faults:
        raise Invalid(faults[0].detail, errors=faults)
