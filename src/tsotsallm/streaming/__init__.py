"""One layer at a time: corpora, sweeps forward and backward, and scores."""
