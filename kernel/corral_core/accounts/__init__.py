"""The `accounts` plugin: user accounts, sign-in, sessions, second factors, invitations, links and emails."""
