"""Developer tools, which are not installed with the package."""
