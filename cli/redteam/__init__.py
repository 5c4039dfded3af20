"""The commands that attack a run, certify its verdicts, and report."""
