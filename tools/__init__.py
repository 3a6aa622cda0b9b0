"""Tools for those who work on the project; none is installed with it."""
