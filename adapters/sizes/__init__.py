"""Sizes that a folder from elsewhere asks for, bounded before memory of these sizes is taken."""
