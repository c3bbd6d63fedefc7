"""Where the growing map is shown."""
