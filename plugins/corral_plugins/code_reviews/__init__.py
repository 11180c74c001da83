"""Code reviews: people read agents' diffs, comment on lines, and approve or reject exactly the diff that they read."""
