"""What a long job says while it runs."""
