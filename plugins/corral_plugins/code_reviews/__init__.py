"""Code reviews: people read the diffs of agents, comment on lines, and decide about exactly the diff that they read."""
