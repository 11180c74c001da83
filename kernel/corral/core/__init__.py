"""The plugin of the kernel itself: accounts and sign-in, health and metrics, plugins, the event log."""
