"""Background work: jobs, which are queued in the transaction of a change, and schedules.

Only one process at a time runs each job or schedule.
"""
