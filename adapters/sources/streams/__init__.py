"""Network streams and cameras of this computer as sources."""
