"""Frames between keyframes: optical flow and trajectories."""
