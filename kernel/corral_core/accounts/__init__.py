"""The plugin `accounts`: user accounts, sign-in, sessions, second factors, invitations, links and emails."""
