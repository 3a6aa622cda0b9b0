"""The version of the package; below every layer, so that whoever writes a file can record it."""

__version__ = "0.1.0"
