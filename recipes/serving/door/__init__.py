"""Connections: who is let in, what is written down, how a server starts and ends."""
