"""Business logic for cost accounting."""
