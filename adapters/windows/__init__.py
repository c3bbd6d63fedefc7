"""Other solvers of windows than the engine's own."""
