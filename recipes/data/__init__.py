"""Training data: samples, where they are read from, and their encoding."""
