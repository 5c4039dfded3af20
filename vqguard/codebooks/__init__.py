"""Codebooks: their start on k-means centres, the straight-through quantiser, the VQ losses."""
