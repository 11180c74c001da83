"""The built-in plugins. Each feature area has its own package."""
