"""The `webhooks` plugin, which sends events to users' systems as signed HTTP requests."""
