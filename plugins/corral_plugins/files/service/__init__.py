"""The business logic of files, and the stores for their content."""
