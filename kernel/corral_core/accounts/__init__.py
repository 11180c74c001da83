"""People: sign-in, sessions, second factors, invitations, links and mail."""
