"""TSOTSALLM: make LLaMA-family models small enough for the computer somebody already has."""
