"""The business logic of the `settings` plugin: stores and applies values, and notifies every process of changes."""
