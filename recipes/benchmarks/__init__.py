"""Data of others, read from the disk in the layouts in which their authors publish them."""
