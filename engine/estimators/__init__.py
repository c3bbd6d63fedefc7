"""Two-view geometry, absolute pose and triangulation from matched points."""
