"""A whole model that runs."""
