"""What runs inside a guarded model."""
