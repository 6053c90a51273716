"""Configuration, parameters, results and errors: plain Python that every other room may import."""
