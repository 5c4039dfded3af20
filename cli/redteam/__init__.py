"""Commands that attack a run and gather what became of it."""
