"""The solver of windows: poses, points and calibrations of some keyframes at once."""
