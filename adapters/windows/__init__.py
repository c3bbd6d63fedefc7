"""Window solvers besides the engine's own: upstream's VGGSfM."""
