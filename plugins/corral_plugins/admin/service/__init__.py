"""The business logic of the `admin` plugin: the kill switch and the administration of accounts."""
