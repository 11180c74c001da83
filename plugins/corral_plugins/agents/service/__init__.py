"""The business rules of agents. Only these modules write to the tables of agents."""
