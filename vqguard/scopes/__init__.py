"""What holds for the length of a `with` block, where threads and tasks share a model."""
