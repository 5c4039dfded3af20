"""What a safety map is made of: evidence, thresholds, policies, and the verdict that follows."""
