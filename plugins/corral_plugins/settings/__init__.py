"""Settings: values that admins change while the product runs."""
