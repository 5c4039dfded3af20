"""How a stage is spread over processes."""
