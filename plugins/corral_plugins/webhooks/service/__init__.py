"""The rules of webhooks: to whom, when and how often an event is delivered, and how the attempts end."""
