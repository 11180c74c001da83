"""The redactor: takes known credentials, and what looks like one, out of text before it is stored or sent."""
