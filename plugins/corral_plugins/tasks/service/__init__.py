"""The business rules for tasks. Only these modules write to the tables of the `tasks` plugin."""
