"""`corral demo`: a whole installation in a temporary folder, with one task from start to result."""
