"""The business rules for approvals."""
