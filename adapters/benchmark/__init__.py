"""LiveSfM and COLMAP's own pipelines on the same frames, with the same threads."""
