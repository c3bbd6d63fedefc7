"""LiveSfM: videos and photos into a growing, bundle-adjusted COLMAP model."""
