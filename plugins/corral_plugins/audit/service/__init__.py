"""Business logic of the audit log."""
