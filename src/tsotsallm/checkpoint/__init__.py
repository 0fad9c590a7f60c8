"""Checkpoints on disk: read lazily, looked at through a view, written in streams."""
