"""LiveSfM: live camera feeds into a growing, bundle-adjusted COLMAP model."""
