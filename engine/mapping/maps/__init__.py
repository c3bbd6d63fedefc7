"""Maps beside the main one, and maps from the start."""
