"""The business logic of the `files` plugin, and the stores for the content of files."""
