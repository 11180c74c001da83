"""Settings: what admins change while the product runs."""
