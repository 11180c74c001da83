"""The business rules of webhooks: which webhooks receive an event, how deliveries are retried, and how they end."""
