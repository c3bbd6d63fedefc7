"""Tracking: optical flow between keyframes, and the trajectory of all frames."""
