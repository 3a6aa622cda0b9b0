"""What `modis-dist doctor` finds, and what to do about it."""
