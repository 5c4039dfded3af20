"""What is done about a file that shows different pictures to different readers."""

REFUSE = "refuse"
"""It is flagged."""
REPORT = "report"
"""All of its readings are judged, and the worst verdict counts."""
IGNORE = "ignore"
"""The picture that `open_image` gives is judged."""
CHOICES = (REFUSE, REPORT, IGNORE)
