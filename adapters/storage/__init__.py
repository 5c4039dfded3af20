"""Guarded models on disk."""
