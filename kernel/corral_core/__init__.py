"""The kernel's built-in plugins: accounts, health, plugin administration, event log, Redis and others."""
