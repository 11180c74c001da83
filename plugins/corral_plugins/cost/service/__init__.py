"""Business logic of cost accounting."""
