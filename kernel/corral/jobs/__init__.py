"""Background work: jobs, queued in the transaction of a change, and schedules, run by one process at a time."""
