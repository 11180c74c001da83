"""The dead letter queue, which contains the tasks that failed for good."""
