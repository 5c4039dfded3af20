"""The attacks, one file each: how each moves. What is the same for all is in the bases above."""
