"""The embedded model, its invented world and its texts: everything can be tried with no download."""
