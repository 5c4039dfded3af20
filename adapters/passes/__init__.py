"""Passes of a model that compute less where less is read."""
