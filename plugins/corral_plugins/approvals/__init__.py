"""Approvals: people decide before something consequential happens, on exactly the content that will be executed."""
