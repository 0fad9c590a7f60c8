"""Try many recipes on one model: spaces, strategies, the ledger of results."""
