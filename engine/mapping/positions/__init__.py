"""Positions and scale of maps."""
