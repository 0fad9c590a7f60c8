"""Pure functions on tensors: grids, masks and compensated rounding. No files, no models."""
