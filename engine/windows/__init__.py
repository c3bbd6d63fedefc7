"""Windows: the solver of poses, points and calibrations of some keyframes at once."""
