"""GitHub for Corral: pull requests become code reviews, issues become tasks, and the outcome is posted back."""
