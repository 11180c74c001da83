"""Background work: jobs, which are queued in the transaction of a change, and schedules.

Each job or schedule is run by only one process at a time.
"""
