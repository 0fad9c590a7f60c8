"""Many recipes tried on one model: spaces, strategies, the ledger of what was found, the best for a budget."""
