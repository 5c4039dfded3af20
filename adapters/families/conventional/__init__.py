"""Families that the default adapter serves, by what differs from the usual names."""
