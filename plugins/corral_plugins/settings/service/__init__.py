"""The rules of settings: storing values, applying them, and telling every process about changes."""
