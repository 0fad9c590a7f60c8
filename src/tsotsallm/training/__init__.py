"""Training with the memory of one layer, or of a whole model where it fits: data, low-rank factors, the loop."""
