"""Settings: values that admins can change at run time."""
