"""The gateway to all models."""
