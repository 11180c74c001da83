"""The kinds of providers that come with the gateway."""
