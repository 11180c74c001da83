"""Notifications: tells people in the app, by mail, Slack, Telegram or a webhook what needs them."""
