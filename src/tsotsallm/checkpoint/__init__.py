"""Checkpoints on disk: read lazily, seen through a view, written in a stream."""
