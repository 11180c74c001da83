"""Create the tables for budgets and reservations."""

from __future__ import annotations

from typing import Any

import peewee


def up(migrator: Any, db: peewee.Database) -> None:
    """Create the tables and indexes."""

    class Base(peewee.Model):
        class Meta:
            database = db
            legacy_table_names = False

    class Budget(Base):
        id = peewee.IntegerField(primary_key=True)
        version = peewee.IntegerField()
        revision = peewee.BigIntegerField()
        monthly_limit_micro = peewee.BigIntegerField(null=True)
        alert_thresholds = peewee.TextField()
        mode = peewee.CharField(max_length=8)
        on_exceeded = peewee.CharField(max_length=16)
        timezone = peewee.CharField(max_length=64)

        class Meta:
            table_name = "cost_budget"

    class AgentLimit(Base):
        agent_id = peewee.CharField(max_length=36, primary_key=True)
        limit_micro = peewee.BigIntegerField()

        class Meta:
            table_name = "cost_agent_limits"

    class BudgetCounter(Base):
        scope = peewee.CharField(max_length=8)
        key = peewee.CharField(max_length=36)
        period = peewee.CharField(max_length=7)
        limit_micro = peewee.BigIntegerField()
        spent_micro = peewee.BigIntegerField()
        reserved_micro = peewee.BigIntegerField()
        alerted = peewee.SmallIntegerField()
        exceeded = peewee.BooleanField()
        lifted = peewee.BooleanField()

        class Meta:
            table_name = "cost_budget_counters"
            primary_key = peewee.CompositeKey("scope", "key", "period")

    class BudgetAlert(Base):
        scope = peewee.CharField(max_length=8)
        key = peewee.CharField(max_length=36)
        period = peewee.CharField(max_length=7)
        threshold = peewee.SmallIntegerField()
        sent_at = peewee.CharField(max_length=24)

        class Meta:
            table_name = "cost_budget_alerts"
            primary_key = peewee.CompositeKey("scope", "key", "period", "threshold")

    class Reservation(Base):
        id = peewee.CharField(max_length=36, primary_key=True)
        holder = peewee.CharField(max_length=8)
        holder_id = peewee.CharField(max_length=36, unique=True)
        lease_id = peewee.CharField(max_length=36, null=True)
        agent_id = peewee.CharField(max_length=36, null=True)
        task_id = peewee.CharField(max_length=36, null=True)
        amount_micro = peewee.BigIntegerField()
        used_micro = peewee.BigIntegerField()
        drawn_micro = peewee.BigIntegerField()
        limit_micro = peewee.BigIntegerField(null=True)
        created_at = peewee.CharField(max_length=24)
        expires_at = peewee.CharField(max_length=24, index=True)

        class Meta:
            table_name = "cost_reservations"
            indexes = ((("created_at", "id"), False), (("agent_id",), False))

    db.create_tables([Budget, AgentLimit, BudgetCounter, BudgetAlert, Reservation])
    db.execute_sql(
        "CREATE UNIQUE INDEX cost_reservations_lease ON cost_reservations (lease_id) WHERE (lease_id IS NOT NULL)"
    )
