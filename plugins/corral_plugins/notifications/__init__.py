"""Notifications: tells people what needs their attention, in the app, by mail, Slack, Telegram or a webhook."""
