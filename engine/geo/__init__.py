"""GPS tracks, similarity transforms and georeferences."""
