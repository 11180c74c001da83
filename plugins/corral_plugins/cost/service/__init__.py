"""The rules of cost accounting."""
