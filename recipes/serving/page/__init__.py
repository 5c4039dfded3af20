"""A page to look at a guarded model with: what it says of a picture, and what it answers."""
