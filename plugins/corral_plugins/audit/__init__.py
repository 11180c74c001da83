"""The audit log: a tamper-evident record of all security-relevant actions."""
