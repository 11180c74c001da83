"""The tables for plugins that an admin disabled, and for plugins in quarantine."""

from __future__ import annotations

import peewee

from corral.database.model import InstantField, Model


class PluginStateRow(Model):
    """The state of a plugin that an admin disabled. The row is deleted when the plugin is enabled.

    If a plugin has no row, the configuration determines whether it is active.
    """

    name = peewee.CharField(primary_key=True, max_length=64)
    state = peewee.CharField(max_length=16)
    reason = peewee.TextField(null=True)
    since = InstantField()

    class Meta:
        table_name = "plugin_admin_states"


class QuarantineRow(Model):
    """A plugin in quarantine, or in the trial period that follows a quarantine.

    A quarantine suspends the hooks, subscriptions, jobs and schedules of the plugin.
    """

    name = peewee.CharField(primary_key=True, max_length=64)
    state = peewee.CharField(max_length=16)  # held (in quarantine) | probation (on trial)
    reason = peewee.TextField()
    since = InstantField()
    probes = peewee.IntegerField(default=0)

    class Meta:
        table_name = "plugin_admin_quarantines"
