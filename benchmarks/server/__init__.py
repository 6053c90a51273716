"""The server under many clients, beside its engine alone."""
