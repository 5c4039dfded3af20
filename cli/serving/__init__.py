"""Commands that serve a guarded model."""
