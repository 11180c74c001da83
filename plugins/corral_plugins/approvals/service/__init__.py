"""The business rules of approvals."""
