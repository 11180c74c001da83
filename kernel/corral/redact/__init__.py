"""The redactor: removes known credentials, and text that looks like one, before text is stored or sent."""
