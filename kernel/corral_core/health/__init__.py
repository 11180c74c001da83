"""The plugin `health`: readiness, health checks, metrics, and the rules for outgoing connections."""
