"""Pictures and videos of a data set: looked at, opened, and given to a processor."""
