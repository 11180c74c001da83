"""The kernel's own plugins: accounts, health, plugin administration, the event log, and Redis."""
