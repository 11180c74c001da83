"""The built-in plugins of the kernel: accounts, health, plugin administration, event log, and Redis."""
