"""What `vqguard scan` prints, and scans whose verdicts go into files."""
