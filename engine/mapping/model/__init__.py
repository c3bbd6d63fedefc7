"""The map: COLMAP reconstruction, pairs, growth and adjustment."""
