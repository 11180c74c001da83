"""The redactor: removes known credentials, and text that looks like a credential, before text is stored or sent."""
