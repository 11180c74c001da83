"""The rules of webhooks: whom an event is delivered to, when, how often, and what becomes of the attempts."""
