"""The regional judge: semantic codes of regions at several scales, read from the visual tokens."""
