"""Attacks by what stands in a message: text in a picture, several pictures, an earlier turn."""
