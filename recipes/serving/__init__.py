"""Guarded models over HTTP, as OpenAI's clients call them."""
