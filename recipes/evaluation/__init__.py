"""What a report measures, one subject a file. Everything becomes records."""
