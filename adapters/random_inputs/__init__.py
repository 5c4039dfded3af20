"""Random pixels and prompts in the forms that processors give them."""
