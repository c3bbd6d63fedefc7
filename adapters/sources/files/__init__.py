"""Photos and videos on disk as sources."""
