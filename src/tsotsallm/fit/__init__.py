"""The best model for a budget: what units cost, plans that spend the budget on them, candidates that are built."""
