"""The business rules of dead letters. Only these modules write to the tables of the plugin."""
