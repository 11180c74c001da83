"""The rules of workers: what the routes, the schedules and other plugins ask for."""
