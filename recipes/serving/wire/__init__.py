"""Requests, answers and errors in the form of OpenAI's API."""
