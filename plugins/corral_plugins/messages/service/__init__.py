"""The business rules of messages. Only these modules write to the tables of messages."""
