"""The business rules of the `admin` plugin: the kill switch, and the account administration by admins."""
