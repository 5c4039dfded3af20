"""The model in its thread: prompts, batches, and each request's own row."""
