"""The kernel's own tables: events and their consumers, jobs and schedules, leases, and idempotent responses."""

from __future__ import annotations

from corral.database.leases import Lease
from corral.events.consumers import ConsumerRow
from corral.events.log import EventRow
from corral.http.idempotency import IdempotencyRow
from corral.jobs.job import JobRow, ScheduleRow

KERNEL_TABLES = (EventRow, ConsumerRow, JobRow, ScheduleRow, Lease, IdempotencyRow)
