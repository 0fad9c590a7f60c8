"""Everything that the command line does, as one call each, by subject."""
