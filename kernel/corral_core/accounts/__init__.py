"""The `accounts` plugin: user accounts, sign-in, sessions, second factors, invitations, single-use links and emails."""
