"""SSH connections: machines on which admins and agents run commands."""
