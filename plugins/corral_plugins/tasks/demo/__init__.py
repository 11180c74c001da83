"""`corral demo`: starts a complete installation in a temporary folder, and runs a task and a workflow."""
