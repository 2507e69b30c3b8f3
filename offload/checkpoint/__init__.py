"""Checkpoints: weights on disk that others wrote."""
