"""Background work: jobs, which are queued in the transaction of a change, and schedules.

One process runs each of them.
"""
