"""Where models and data come from, and how files are written."""
