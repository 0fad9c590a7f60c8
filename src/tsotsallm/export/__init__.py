"""Results in the forms that other engines run."""
