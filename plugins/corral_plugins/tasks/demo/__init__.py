"""`corral demo`: starts a complete installation in a temporary folder and runs one task from start to finish."""
