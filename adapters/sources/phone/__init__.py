"""A phone's browser as a source."""
