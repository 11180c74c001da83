"""The rules of this plugin, and the only writer of its tables."""
