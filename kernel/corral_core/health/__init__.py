"""The `health` plugin: readiness, health checks, metrics, and the rules for outgoing connections."""
