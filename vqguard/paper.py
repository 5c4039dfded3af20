"""Numbers of the paper (arXiv 2511.16229) that stand in more than one place."""

PAPER_TAU = 0.6
"""Threshold of the safety map: a cell is toxic above it."""
