"""The business logic of the audit log."""
