"""What a retrofit will cost in memory and time, told before it runs."""
