"""Notifications inform people of events that need their attention: in the app, by email, Slack, Telegram or webhook."""
