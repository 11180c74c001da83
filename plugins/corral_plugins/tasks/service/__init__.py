"""The business rules of tasks. Only these modules write to the tables of the `tasks` plugin."""
