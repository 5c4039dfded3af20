"""Attack suites: which attacks are run on whom, what became of each attempt, and what it means."""
