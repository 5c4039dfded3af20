"""What one record of a data set says, in whatever form it is written."""
