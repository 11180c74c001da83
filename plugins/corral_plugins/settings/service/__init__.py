"""The business logic of settings: storing values, applying them, and notifying every process of changes."""
