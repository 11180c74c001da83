"""Background work: schedules, and jobs, which are queued in the transaction of a change.

Each job or schedule is run by only one process at a time.
"""
