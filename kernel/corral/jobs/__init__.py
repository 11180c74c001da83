"""Background work: schedules, and jobs, which are queued in the transaction of the unit of work that calls `enqueue`.

Each job or schedule is run by only one process at a time.
"""
