"""Verdicts on many pictures: the files of a scan, in one process or in many."""
