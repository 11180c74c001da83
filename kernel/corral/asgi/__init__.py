"""The kernel as a Quart application: the request path, stage by stage, and the table that dispatches to it."""
