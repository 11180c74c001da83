"""Notifications inform people of events that need their attention: in the app, by mail, Slack, Telegram or webhook."""
