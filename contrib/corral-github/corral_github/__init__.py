"""GitHub for Corral: turns pull requests into code reviews and issues into tasks, and posts the results to GitHub."""
