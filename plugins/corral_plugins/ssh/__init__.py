"""SSH connections to machines on which admins and agents run commands."""
