"""The business rules of administration: the kill switch, and people as admins see them."""
