"""A judge alone: calibrated from images in minutes, measured on images that it has not seen."""
