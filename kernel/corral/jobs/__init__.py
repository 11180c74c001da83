"""Background work: jobs that take effect with the unit that enqueues them, and schedules that run once a slot."""
